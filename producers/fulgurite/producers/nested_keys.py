"""Masks the values of keys within JSON text, by the expressions of `schemas.nested_keys`, as ClickHouse does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from fulgurite.schemas.nested_keys import FIRST, MARK, Form, field_names, forms

MAX_NAMES: Final = 4_096
"""Keys of which it is remembered whether they are masked."""


class NestedKeys:
    """`is_masked` says so of a name. May be used by several threads."""

    def __init__(self, is_masked: Callable[[str], bool]) -> None:
        self._is_masked = is_masked
        self._otlp, self._plain = [_Compiled(form) for form in forms(python=True)]
        self._known: dict[str, bool] = {}

    def of_attribute(self, text: str) -> str:
        """Of an object or a list as JSON text; other texts stay as they are."""
        return self._plain.masked(text, self._hit) if text and text[0] in FIRST else text

    def of_letter(self, text: str) -> str:
        """Of a dead letter, whatever it is. Fields of our events and of OTLP are no attributes."""
        text = self._otlp.masked(text, self._hit)
        return self._plain.masked(text, lambda name: self._hit(name) and name not in field_names())

    def _hit(self, name: str) -> bool:
        try:
            return self._known[name]
        except KeyError:
            hit = self._is_masked(name)
            if len(self._known) < MAX_NAMES:
                self._known[name] = hit
            return hit


class _Compiled:
    """One form of a key with its value."""

    def __init__(self, form: Form) -> None:
        self._key, self._value, self._masked = re.compile(form.key), re.compile(form.value), form.masked

    def masked(self, text: str, hit: Callable[[str], bool]) -> str:
        """With the values masked of keys that are hit."""
        if not any(map(hit, set(self._key.findall(text)))):
            return text
        unmarked = text.replace(MARK, "")
        marked = self._key.sub(lambda found: found[0] + MARK if hit(found[1]) else found[0], unmarked)
        return self._value.sub(lambda _: self._masked, marked).replace(MARK, "")

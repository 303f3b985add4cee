"""Regular expressions run by RE2: in linear time, whatever the expression and the text, so that no rule stops a stream.

Positions are characters of the text. Expressions are those of `schemas.patterns`, and mean what they mean to Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import re2

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.patterns import Pattern

MAX_COMPILED_BYTES: Final = 8 * 1024 * 1024
"""Of one expression: RE2's own bound, and ClickHouse's."""


@dataclass(frozen=True, slots=True)
class Found:
    """One match: characters start (inclusive) to end (exclusive)."""

    start: int
    end: int
    text: str


class Expression:
    """One of them, compiled."""

    def __init__(self, pattern: Pattern) -> None:
        """Raises SettingsError for one that grows too large: {1000} within {1000}."""
        options = cast("Any", re2).Options()
        options.max_mem = MAX_COMPILED_BYTES
        options.log_errors = False  # to the process's standard error, past our logs
        try:
            self._compiled: Any = cast("Any", re2).compile(pattern.re2, options)
        except cast("type[Exception]", re2.error) as error:
            why = b": ".join(error.args).decode()
            raise SettingsError(f"the expression {pattern.re2[:200]!r} cannot be used: {why}") from None

    def finditer(self, text: str) -> Iterator[Found]:
        """The matches from left to right, none within another."""
        for match in self._compiled.finditer(_encodable(text)):
            yield Found(match.start(), match.end(), text[match.start() : match.end()])

    def found_in(self, text: str) -> bool:
        return self._compiled.search(_encodable(text)) is not None


def _encodable(text: str) -> str:
    """Half a surrogate pair has no UTF-8: a question mark stands in its place, and every position stays."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text

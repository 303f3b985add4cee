"""The rules of `redaction`, applied to spans, rewards and dead letters before they reach Kafka.

    redact = redactor(settings.redaction)      None without rules: nothing is called then
    span = redact.event(span)                  the same object when nothing in it matched
    found = redact.sources(attributes, kept)   attributes as fields are made of them: the field has its source's rule

Pure: knows neither Kafka nor settings' sources. Touches texts and attributes only; ids, tokens, logprobs, versions,
times and numbers stay what training needs. Does to a span what `schemas.redaction_sql` does to it in ClickHouse: a
value that is no text counts as its JSON, and becomes a text where a rule changes it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json

from fulgurite.producers.nested_keys import NestedKeys
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.redaction import (
    HASH_DIGITS,
    HASH_PREFIX,
    MASK,
    KeyRule,
    RedactionSettings,
    ValueRule,
    is_protected,
)
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.spans import Span, SpanEvent, SpanLink

MAX_NAMES = 4_096
"""Attribute names whose rule is remembered. Programs have hundreds; whoever makes names of ids costs no memory."""

_HASHED = re.compile(rf"{HASH_PREFIX}[0-9a-f]{{{HASH_DIGITS}}}")

_WORDS = ("name", "service", "agent", "operation", "model", "endpoint", "finish_reason")
"""Fields of a span from which only parts are taken out."""

E = TypeVar("E", bound=BaseModel)
Change = Callable[[str], str]


def redactor(rules: RedactionSettings) -> Redactor | None:
    return None if rules.empty else Redactor(rules)


class Redactor:
    """The rules, compiled. May be used by several threads."""

    def __init__(self, rules: RedactionSettings) -> None:
        self._rules = rules
        self._keys = [(rule.pattern.compiled().search, rule) for rule in rules.keys]
        self._values = [(rule.part, _substitute(rule)) for rule in rules.values]
        self._nested = NestedKeys(self._is_masked) if any(rule.action != "cut" for rule in rules.keys) else None
        self._by_name: dict[str, Change | None] = {}
        self._sources: dict[str, Change | None] = {}

    def event(self, event: E) -> E:
        """A span or a reward without what the rules take out; any other event as it is."""
        if isinstance(event, Span):
            return self._copied(event, self._span_changes(event))
        if isinstance(event, Reward):
            return self._copied(event, {"metadata": self.attributes(event.metadata)})
        return event

    def dead_letter(self, dead: DeadLetter) -> DeadLetter:
        """What value rules match is taken out of the bytes, be they text or not, and of the message, and of JSON the
        values of keys that have a rule; the rest is kept to be looked at."""
        message, value = self.parts(dead.message), self.letter(dead.value)
        return dead if (message, value) == (dead.message, dead.value) else replace(dead, message=message, value=value)

    def letter(self, value: bytes | None) -> bytes | None:
        """The bytes of a dead letter."""
        if value is None or not (self._values or self._nested):
            return value
        text = self.parts(value.decode("utf-8", "surrogateescape"))
        if self._nested is not None:
            text = self._nested.of_letter(text)
        return text.encode("utf-8", "surrogateescape")

    def text(self, text: str) -> str:
        """Parts taken out, then cut to max_text_chars."""
        return cut(self.parts(text), self._rules.max_text_chars)

    def parts(self, text: str) -> str:
        """What value rules match is replaced, nothing else."""
        if text:
            for part, substitute in self._values:
                if part in text:
                    text = substitute(text)
        return text

    def attributes(self, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without what is dropped; the same object when no rule changed anything."""
        found: dict[str, Any] = {}
        changed = False
        for name, value in attributes.items():
            try:
                change = self._by_name[name]
            except KeyError:
                change = self._remember(name)
            if change is None:
                changed = True
                continue
            found[name] = new = _changed(value, change)
            changed = changed or new is not value
        return found if changed else attributes

    def sources(self, attributes: Mapping[str, Any], kept: Collection[str] = ()) -> Mapping[str, Any]:
        """The attributes by the rules of `keys` alone, for fields to be made of them; the same object without such.
        Rules of `values` follow where the field itself is redacted. `kept`: what ids and counts are made of."""
        found: dict[str, Any] = {}
        for name, value in attributes.items() if self._keys else ():
            change = _kept if name in kept else self._source_change(name)
            if change is not None:
                found[name] = _changed(value, change)
        return found if self._keys else attributes

    def _span_changes(self, span: Span) -> dict[str, Any]:
        changes: dict[str, Any] = {
            **{name: self.parts(getattr(span, name)) for name in _WORDS},
            "status_message": self.text(span.status_message),
            "input": self.text(span.input),
            "output": self.text(span.output),
            "attributes": self.attributes(span.attributes),
            "resource_attributes": self.attributes(span.resource_attributes),
            "state": self.attributes(span.state),
        }
        if span.events:
            changes["events"] = [self._event(event) for event in span.events]
        if span.links:
            changes["links"] = [self._link(link) for link in span.links]
        return changes

    def _event(self, event: SpanEvent) -> SpanEvent:
        name, attributes = self.parts(event.name), self.attributes(event.attributes)
        if name == event.name and attributes is event.attributes:
            return event
        return event.model_copy(update={"name": name, "attributes": attributes})

    def _link(self, link: SpanLink) -> SpanLink:
        attributes = self.attributes(link.attributes)
        return link if attributes is link.attributes else link.model_copy(update={"attributes": attributes})

    def _copied(self, event: E, changes: Mapping[str, Any]) -> E:
        """The event with what really changed; fields that this version does not know count as attributes."""
        changes = {name: value for name, value in changes.items() if value != getattr(event, name)}
        unknown = event.model_extra or {}
        kept = self.attributes(unknown) if unknown else unknown
        if not changes and kept is unknown:
            return event
        copy = event.model_copy(update=changes)
        if kept is not unknown:
            copy.__pydantic_extra__ = dict(kept)
        return copy

    def _source_change(self, name: str) -> Change | None:
        """As `_change_of` where a rule names the attribute; otherwise it stays as it is."""
        if name in self._sources:
            return self._sources[name]
        if is_protected(name):
            change = _kept
        elif any(search(name) for search, _ in self._keys):
            change = self._change_of(name)
        else:
            change = self._nested.of_attribute if self._nested is not None else _kept
        if len(self._sources) < MAX_NAMES:
            self._sources[name] = change
        return change

    def _remember(self, name: str) -> Change | None:
        change = self._change_of(name)
        if len(self._by_name) < MAX_NAMES:
            self._by_name[name] = change
        return change

    def _change_of(self, name: str) -> Change | None:
        """What becomes of this attribute's value; None: dropped."""
        if is_protected(name):
            return _kept
        rule = next((rule for search, rule in self._keys if search(name)), None)
        if rule is not None and rule.action == "drop":
            return None
        if rule is not None and rule.action == "mask":
            return _masked
        if rule is not None and rule.action == "hash":
            return self._hashed
        chars, nested = _least(rule, self._rules.max_value_chars), self._nested
        if nested is not None:
            return lambda text: cut(nested.of_attribute(self.parts(text)), chars)
        return (lambda text: cut(self.parts(text), chars)) if self._values or chars else _kept

    def _is_masked(self, name: str) -> bool:
        """Whether a rule takes away the value of an attribute of this name."""
        rule = next((rule for search, rule in self._keys if search(name)), None)
        return rule is not None and rule.action != "cut" and not is_protected(name)

    def _hashed(self, text: str) -> str:
        if _HASHED.fullmatch(text):
            return text
        salted = self._rules.hash_salt.get_secret_value() + text
        return HASH_PREFIX + hashlib.sha256(salted.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]


def cut(text: str, chars: int) -> str:
    """At most `chars` characters (0: any number), the mark of the cut included: cutting again changes nothing."""
    if not chars or len(text) <= chars:
        return text
    mark = f"… ({len(text)} characters)"
    return text[: chars - len(mark)] + mark


def _substitute(rule: ValueRule) -> Change:
    """Puts the rule's mark for what it matches."""
    if not rule.skip:
        substitute, mark = rule.pattern.compiled().sub, rule.mark
        return lambda text: substitute(mark, text)
    expression = re.compile(f"({rule.pattern.python})|{rule.skip}", re.ASCII)
    return lambda text: expression.sub(lambda found: found[0] if found[1] is None else rule.mark, text)


def _changed(value: Any, change: Change) -> Any:
    """The same object when the rule left its text alone."""
    if change is _kept:
        return value
    text = value if isinstance(value, str) else to_json(value, inf_nan_mode="strings").decode()
    new = change(text)
    return value if new == text else new


def _kept(text: str) -> str:
    return text


def _masked(text: str) -> str:
    return MASK


def _least(rule: KeyRule | None, most: int) -> int:
    """The smaller bound, where 0 is none."""
    chars = rule.chars if rule is not None else 0
    return min(chars, most) if chars and most else chars or most

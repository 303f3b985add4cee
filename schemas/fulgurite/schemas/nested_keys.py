"""Where JSON text names a key that a rule is for, as expressions that Python and RE2 read alike.

Rules of `keys` are for attributes by name. An attribute that is an object is stored as JSON text, and a dead letter is
one as a whole, or was to be: within them the value behind such a key is masked. Found by expressions and not by a
parser, so that text that is broken, or cut off, is searched as well. Two forms:

    "name": value                      JSON, at any depth
    "key": "name", "value": {…}        OTLP JSON, of dead letters alone

Names are compared as they are written, escapes included. JSON within a text of JSON is not looked into.

Promises: whatever the text, a search ends in time that grows with its length. A value ends where its string, number or
object ends, or the text; an object nested deeper than DEPTH takes with it all that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

from fulgurite.schemas.redaction import MASK as REDACTED

DEPTH: Final = 4
FIRST: Final = "{[ \t\r\n"
"""What a value begins with that is JSON text of an object or a list."""

OTLP_FIELDS: Final[frozenset[str]] = frozenset(
    (
        *("resourceSpans", "resource", "scopeSpans", "scope", "spans", "events", "links", "schemaUrl", "version"),
        *("attributes", "key", "value", "values", "stringValue", "boolValue", "intValue", "doubleValue"),
        *("arrayValue", "kvlistValue", "bytesValue", "name", "traceId", "spanId", "traceState", "parentSpanId"),
        *("kind", "flags", "startTimeUnixNano", "endTimeUnixNano", "timeUnixNano", "status", "message", "code"),
        *("droppedAttributesCount", "droppedEventsCount", "droppedLinksCount"),
    )
)


MARK: Final = "\x01\x1a"
"""Stands behind a key that is to be masked, while its value is looked for: one expression does for all keys, and need
not be made anew for those of each text. Not in JSON."""


@dataclass(frozen=True, slots=True)
class Form:
    """`key` finds keys, with the name as its group; `value` what follows a mark, of which `masked` takes the place."""

    key: str
    value: str
    masked: str


@cache
def forms(*, python: bool) -> tuple[Form, Form]:
    """OTLP JSON and JSON, in an order in which the first takes away nothing that the second looks for."""
    # Python's engine goes back into what it has matched, and is told not to; RE2 has no such thing, and no need.
    once, end = ("+", r"\Z") if python else ("", r"\z")
    # Whole but where there is a quotation mark in it: each place of a text is looked at once. Not before a \".
    name = r'(?:[^"]*[^"\\])?'
    text = rf'[^"\\]*{once}(?:\\.[^"\\]*{once})*{once}'
    string = rf'"{text}(?:"|\\?{end})'
    found = _object(string, once, end)
    value = rf'(?:{string}|[^\s"{{}}\[\],:]+|{found})'
    return (
        Form(
            rf'"key"\s*:\s*"({name})"\s*,\s*"value"\s*:',
            rf"(?s){MARK}\s*{value}",
            f'{{"stringValue":"{REDACTED}"}}',
        ),
        Form(rf'"({name})"\s*:', rf"(?s){MARK}\s*{value}", f'"{REDACTED}"'),
    )


def _object(string: str, once: str, end: str) -> str:
    """An object or a list, whose closing brackets are not told apart; else all that follows."""
    plain = r'[^"\\{}\[\]]'
    found = rf"[{{\[](?:{plain}|{string})*{once}(?:[}}\]]|{end})"
    for _ in range(DEPTH - 1):
        found = rf"[{{\[](?:{plain}|{string}|{found})*{once}(?:[}}\]]|{end})"
    return rf"{found}|[{{\[].*"


@cache
def field_names() -> frozenset[str]:
    """Keys of our events and of OTLP JSON that are no attributes, however a rule matches them."""
    from fulgurite.schemas.exports import EVENTS  # all events: whoever has no rules for keys needs none

    found = set[str](OTLP_FIELDS)
    waiting: list[Any] = [adapter.json_schema() for adapter in EVENTS.values()]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            part = cast("dict[str, Any]", part)
            found.update(cast("dict[str, Any]", part.get("properties", {})))
            waiting += part.values()
        elif isinstance(part, list):
            waiting += cast("list[Any]", part)
    return frozenset(found)

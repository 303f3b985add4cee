"""OTLP protobuf as OTLP JSON: how a dead letter of OTLP can be read, redacted, mended and sent again.

Promises: what `from_json` makes of it is what was read, field by field, but for fields that no table has a place for
(flags, schema URLs); bytes of a text that are no UTF-8 become the replacement character. Raises Malformed.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from fulgurite.consumers.otlp.spans import MAX_DEPTH
from fulgurite.consumers.otlp.wire import FIXED64, LENGTH, VARINT, Malformed, fields, read_double, read_fixed64

_Read = Callable[[bytes, int, int, int], Any]
"""Of bytes, the bounds of a value (of a VARINT the value in place of the first) and how deep it lies."""


class _Field(NamedTuple):
    name: str
    wire: int
    read: _Read
    repeated: bool = False


_Schema = Mapping[int, _Field]


def to_json(value: bytes, only: int | None = None) -> bytes:
    """A TracesData; of its spans all, or only the one with this number, from 0, with its resource and scope."""
    found = [
        _message(_RESOURCE_SPANS, value, start, stop, 0)
        for number, kind, start, stop in fields(value, 0, len(value))
        if number == 1 and kind == LENGTH
    ]
    return json.dumps(
        {"resourceSpans": found if only is None else _alone(found, only)}, ensure_ascii=False, separators=(",", ":")
    ).encode()


def _alone(resources: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    for resource in resources:
        for scope in resource.get("scopeSpans", []):
            spans = scope.get("spans", [])
            if number < len(spans):
                return [{**resource, "scopeSpans": [{**scope, "spans": [spans[number]]}]}]
            number -= len(spans)
    raise Malformed("the record has no such span")


def _message(schema: _Schema, data: bytes, at: int, end: int, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, kind, start, stop in fields(data, at, end):
        field = schema.get(number)
        if field is None or field.wire != kind:
            continue
        value = field.read(data, start, stop, depth)
        if field.repeated:
            found.setdefault(field.name, []).append(value)
        elif isinstance(value, dict) and isinstance(before := found.get(field.name), dict):
            found[field.name] = _merged(before, value)  # a message in two pieces
        else:
            found.pop(field.name, None)  # the last one is the last
            found[field.name] = value
    return found


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    lists = {name: [*first[name], *more] for name, more in second.items() if isinstance(first.get(name), list)}
    return {**first, **second, **lists}


def _sub(schema: _Schema) -> _Read:
    return lambda data, start, stop, depth: _message(schema, data, start, stop, depth)


def _text(data: bytes, start: int, stop: int, _: int) -> str:
    return data[start:stop].decode(errors="replace")


def _hex(data: bytes, start: int, stop: int, _: int) -> str:
    return data[start:stop].hex()


def _base64(data: bytes, start: int, stop: int, _: int) -> str:
    return b64encode(data[start:stop]).decode()


def _fixed64(data: bytes, start: int, stop: int, _: int) -> str:
    return str(read_fixed64(data, start))


def _int64(data: bytes, value: int, stop: int, _: int) -> str:
    return str(value - 2**64 if value >= 2**63 else value)


def _int32(data: bytes, value: int, stop: int, _: int) -> int:
    low = value & 0xFFFF_FFFF
    return low - 2**32 if low >= 2**31 else low


def _uint32(data: bytes, value: int, stop: int, _: int) -> int:
    return value & 0xFFFF_FFFF


def _bool(data: bytes, value: int, stop: int, _: int) -> bool:
    return bool(value)


def _double(data: bytes, start: int, stop: int, _: int) -> float | str:
    value = read_double(data, start)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _any(data: bytes, start: int, stop: int, depth: int) -> dict[str, Any]:
    """Of several values the last one."""
    if depth > MAX_DEPTH:
        raise Malformed("a value is nested too deeply")
    return dict(list(_message(_ANY, data, start, stop, depth + 1).items())[-1:])


_KEY_VALUE: Final[_Schema] = {1: _Field("key", LENGTH, _text), 2: _Field("value", LENGTH, _any)}
_ANY: Final[_Schema] = {
    1: _Field("stringValue", LENGTH, _text),
    2: _Field("boolValue", VARINT, _bool),
    3: _Field("intValue", VARINT, _int64),
    4: _Field("doubleValue", FIXED64, _double),
    5: _Field("arrayValue", LENGTH, _sub({1: _Field("values", LENGTH, _any, repeated=True)})),
    6: _Field("kvlistValue", LENGTH, _sub({1: _Field("values", LENGTH, _sub(_KEY_VALUE), repeated=True)})),
    7: _Field("bytesValue", LENGTH, _base64),
}
_ATTRIBUTES: Final = _Field("attributes", LENGTH, _sub(_KEY_VALUE), repeated=True)
_EVENT: Final[_Schema] = {
    1: _Field("timeUnixNano", FIXED64, _fixed64),
    2: _Field("name", LENGTH, _text),
    3: _ATTRIBUTES,
    4: _Field("droppedAttributesCount", VARINT, _uint32),
}
_LINK: Final[_Schema] = {
    1: _Field("traceId", LENGTH, _hex),
    2: _Field("spanId", LENGTH, _hex),
    3: _Field("traceState", LENGTH, _text),
    4: _ATTRIBUTES,
    5: _Field("droppedAttributesCount", VARINT, _uint32),
}
_STATUS: Final[_Schema] = {2: _Field("message", LENGTH, _text), 3: _Field("code", VARINT, _int32)}
_SPAN: Final[_Schema] = {
    1: _Field("traceId", LENGTH, _hex),
    2: _Field("spanId", LENGTH, _hex),
    3: _Field("traceState", LENGTH, _text),
    4: _Field("parentSpanId", LENGTH, _hex),
    5: _Field("name", LENGTH, _text),
    6: _Field("kind", VARINT, _int32),
    7: _Field("startTimeUnixNano", FIXED64, _fixed64),
    8: _Field("endTimeUnixNano", FIXED64, _fixed64),
    9: _ATTRIBUTES,
    10: _Field("droppedAttributesCount", VARINT, _uint32),
    11: _Field("events", LENGTH, _sub(_EVENT), repeated=True),
    12: _Field("droppedEventsCount", VARINT, _uint32),
    13: _Field("links", LENGTH, _sub(_LINK), repeated=True),
    14: _Field("droppedLinksCount", VARINT, _uint32),
    15: _Field("status", LENGTH, _sub(_STATUS)),
}
_SCOPE: Final[_Schema] = {
    1: _Field("name", LENGTH, _text),
    2: _Field("version", LENGTH, _text),
    3: _ATTRIBUTES,
}
_SCOPE_SPANS: Final[_Schema] = {
    1: _Field("scope", LENGTH, _sub(_SCOPE)),
    2: _Field("spans", LENGTH, _sub(_SPAN), repeated=True),
}
_RESOURCE_SPANS: Final[_Schema] = {
    1: _Field("resource", LENGTH, _sub({1: _ATTRIBUTES})),
    2: _Field("scopeSpans", LENGTH, _sub(_SCOPE_SPANS), repeated=True),
}

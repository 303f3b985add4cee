"""What ClickHouse's reader of protobuf refuses, in a form that it takes: for the few records that need it.

    an array or a list       its JSON text, whatever its depth (schemas/otlp.proto reads two levels, one of resources,
                             scopes, events and links); beyond MAX_DEPTH base64 text of its protobuf
    several values of one    the last one, as protobuf says
    another wire type        left out, as protobuf says
    a span cut off within    a span without an id: status BROKEN, why as its message, its bytes as its trace state, of
                             which SQL makes a dead letter (tables/0014_otlp.sql). The same for all spans of a resource
                             or a scope that is cut off within

Promises: as many spans, in their order; what ClickHouse reads without this gives the same row with it, but for spaces
and digits of numbers in JSON. Raises Malformed where spans cannot be told apart.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import orjson

from fulgurite.consumers.otlp.spans import MAX_DEPTH
from fulgurite.consumers.otlp.wire import (
    FIXED64,
    LENGTH,
    VARINT,
    Malformed,
    fields,
    length_field,
    number_field,
    read_double,
    varint,
)

BROKEN: Final = -(2**31)
"""No status code of OTLP."""

_Write = Callable[[int, bytes, int, int], bytes]


class _Field(NamedTuple):
    name: str
    wire: int
    write: _Write | None = None
    """None: as it is."""
    repeated: bool = False


_Schema = Mapping[int, _Field]


def mended(value: bytes) -> bytes:
    """A TracesData as one that is read."""
    return b"".join(
        length_field(1, _resource_spans(value, start, stop))
        for number, kind, start, stop in fields(value, 0, len(value))
        if number == 1 and kind == LENGTH
    )


def _resource_spans(data: bytes, at: int, end: int) -> bytes:
    resource, why, scopes = b"", "", list[tuple[int, int]]()
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            try:
                resource += length_field(1, _message(_RESOURCE, data, start, stop))
            except Malformed as error:
                why = f"resource: {error}"
        elif number == 2 and kind == LENGTH:
            scopes.append((start, stop))
    return resource + b"".join(length_field(2, _scope_spans(data, start, stop, why)) for start, stop in scopes)


def _scope_spans(data: bytes, at: int, end: int, why: str) -> bytes:
    scope, spans = b"", list[tuple[int, int]]()
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            try:
                scope += length_field(1, _message(_SCOPE, data, start, stop))
            except Malformed as error:
                why = why or f"scope: {error}"
        elif number == 2 and kind == LENGTH:
            spans.append((start, stop))
    return scope + b"".join(length_field(2, _span(data, start, stop, why)) for start, stop in spans)


def _span(data: bytes, at: int, end: int, why: str) -> bytes:
    if not why:
        try:
            return _message(_SPAN, data, at, end)
        except Malformed as error:
            why = str(error)
    return broken(data[at:end], why)


def broken(value: bytes, why: str) -> bytes:
    """A Span that stands for one that cannot be read; `value`: its bytes."""
    status = length_field(2, f"the span cannot be read: {why}".encode()) + number_field(3, BROKEN)
    return length_field(3, value) + length_field(15, status)


def _message(schema: _Schema, data: bytes, at: int, end: int) -> bytes:
    parts: list[bytes] = []
    singles: dict[int, bytes] = {}
    for number, kind, start, stop in fields(data, at, end):
        field = schema.get(number)
        if field is not None and field.wire == kind:
            name, _, write, repeated = field
            try:
                written = data[at:stop] if write is None else write(number, data, start, stop)
            except Malformed as error:
                raise Malformed(f"{name}: {error}") from None
            if repeated:
                parts.append(written)
            else:
                singles[number] = written
        at = stop
    return b"".join((*singles.values(), *parts))


def _attribute(number: int, data: bytes, start: int, stop: int) -> bytes:
    if _is_short_text(data, start, stop):
        return length_field(number, data[start:stop])
    return length_field(number, _message(_ATTRIBUTE, data, start, stop))


def _is_short_text(data: bytes, at: int, end: int) -> bool:
    """Whether it is a KeyValue of a key and a text, the most frequent one: a quick look instead of a long one."""
    if end - at < 6 or data[at] != 0x0A or (key := data[at + 1]) >= 0x80:
        return False
    value = at + 2 + key
    return (
        value + 4 <= end
        and data[value] == 0x12
        and data[value + 2] == 0x0A
        and data[value + 1] < 0x80
        and value + 2 + data[value + 1] == end
        and data[value + 3] + 2 == data[value + 1]
    )


def _sub(schema: _Schema) -> _Write:
    return lambda number, data, start, stop: length_field(number, _message(schema, data, start, stop))


def _int32(number: int, data: bytes, value: int, _: int) -> bytes:
    low = value & 0xFFFF_FFFF
    return number_field(number, low - 2**32 if low >= 2**31 else low)


def _uint32(number: int, data: bytes, value: int, _: int) -> bytes:
    return number_field(number, value & 0xFFFF_FFFF)


def _any(number: int, data: bytes, start: int, stop: int) -> bytes:
    """An AnyValue."""
    chosen = _chosen(data, start, stop)
    if chosen is None:
        return length_field(number, b"")
    kind, at, end = chosen
    if kind in (_ARRAY, _LIST):
        return length_field(number, length_field(_TEXT, _container(chosen, data, 1).encode()))
    match _WIRES[kind]:
        case 0:
            scalar = number_field(kind, int(at != 0) if kind == _BOOL else at)
        case 1:
            scalar = varint(kind << 3 | FIXED64) + data[at:end]
        case _:
            scalar = length_field(kind, data[at:end])
    return length_field(number, scalar)


_TEXT, _BOOL, _INT, _DOUBLE, _ARRAY, _LIST, _BINARY = range(1, 8)
_WIRES: Final = {
    _TEXT: LENGTH,
    _BOOL: VARINT,
    _INT: VARINT,
    _DOUBLE: FIXED64,
    _ARRAY: LENGTH,
    _LIST: LENGTH,
    _BINARY: LENGTH,
}


def _chosen(data: bytes, at: int, end: int) -> tuple[int, int, int] | None:
    """Of an AnyValue: the field that counts, and its bounds."""
    chosen = None
    for number, kind, start, stop in fields(data, at, end):
        if _WIRES.get(number) == kind:
            chosen = number, start, stop
    return chosen


def _json(data: bytes, at: int, end: int, depth: int) -> str:
    """An AnyValue as SQL writes one within a container."""
    chosen = _chosen(data, at, end)
    if chosen is None:
        return "null"
    kind, start, stop = chosen
    if kind in (_ARRAY, _LIST):
        return _container(chosen, data, depth + 1)
    match kind:
        case 2:
            return "true" if start else "false"
        case 3:
            return str(start - 2**64 if start >= 2**63 else start)
        case 4:
            return orjson.dumps(read_double(data, start)).decode()
        case 7:
            return _quoted(b64encode(data[start:stop]))
        case _:
            return _quoted(data[start:stop])


def _container(chosen: tuple[int, int, int], data: bytes, depth: int) -> str:
    kind, start, stop = chosen
    if depth > MAX_DEPTH:
        return _quoted(b64encode(data[start:stop]))
    if kind == _ARRAY:
        return f"[{','.join(_json(data, a, b, depth) for a, b in _parts(data, start, stop))}]"
    return f"{{{','.join(_pair(data, a, b, depth) for a, b in _parts(data, start, stop))}}}"


def _parts(data: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """The bounds of the values of an ArrayValue or a KeyValueList."""
    return ((start, stop) for number, kind, start, stop in fields(data, at, end) if number == 1 and kind == LENGTH)


def _pair(data: bytes, at: int, end: int, depth: int) -> str:
    key, value = '""', "null"
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            key = _quoted(data[start:stop])
        elif number == 2 and kind == LENGTH:
            value = _json(data, start, stop, depth)
    return f"{key}:{value}"


def _quoted(text: bytes) -> str:
    return orjson.dumps(text.decode(errors="replace")).decode()


_ATTRIBUTE: Final[_Schema] = {1: _Field("key", LENGTH), 2: _Field("value", LENGTH, _any)}
_ATTRIBUTES: Final = _Field("attributes", LENGTH, _attribute, repeated=True)
_RESOURCE: Final[_Schema] = {1: _ATTRIBUTES}
_SCOPE: Final[_Schema] = {
    1: _Field("name", LENGTH),
    2: _Field("version", LENGTH),
    3: _ATTRIBUTES,
}
_EVENT: Final[_Schema] = {
    1: _Field("time_unix_nano", FIXED64),
    2: _Field("name", LENGTH),
    3: _ATTRIBUTES,
}
_LINK: Final[_Schema] = {
    1: _Field("trace_id", LENGTH),
    2: _Field("span_id", LENGTH),
    4: _ATTRIBUTES,
}
_STATUS: Final[_Schema] = {2: _Field("message", LENGTH), 3: _Field("code", VARINT, _int32)}
_SPAN: Final[_Schema] = {
    1: _Field("trace_id", LENGTH),
    2: _Field("span_id", LENGTH),
    3: _Field("trace_state", LENGTH),
    4: _Field("parent_span_id", LENGTH),
    5: _Field("name", LENGTH),
    6: _Field("kind", VARINT, _int32),
    7: _Field("start_time_unix_nano", FIXED64),
    8: _Field("end_time_unix_nano", FIXED64),
    9: _ATTRIBUTES,
    10: _Field("dropped_attributes_count", VARINT, _uint32),
    11: _Field("events", LENGTH, _sub(_EVENT), repeated=True),
    12: _Field("dropped_events_count", VARINT, _uint32),
    13: _Field("links", LENGTH, _sub(_LINK), repeated=True),
    14: _Field("dropped_links_count", VARINT, _uint32),
    15: _Field("status", LENGTH, _sub(_STATUS)),
}

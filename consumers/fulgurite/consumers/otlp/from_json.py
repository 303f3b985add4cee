"""OTLP JSON (a TracesData as the Collector's encoding otlp_json writes it) as OTLP protobuf, so that everything behind
has one form to read. The one place where Python looks into spans: JSON is for trying things out, protobuf for volume.

Promises: the same spans, field by field (ids from hex, 64-bit numbers from strings or numbers); fields this version
does not know are left out, as protobuf's own JSON readers do. Raises Malformed: what is wrong, and where.
"""

from __future__ import annotations

import binascii
import struct
from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import orjson

from fulgurite.consumers.otlp.wire import FIXED64, Malformed, length_field, number_field, varint

_Write = Callable[[int, Any], bytes]

_KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_CODES = ("UNSET", "OK", "ERROR")


def from_json(value: bytes) -> bytes:
    """The record's value as protobuf."""
    try:
        return _message(_TRACES, orjson.loads(value))
    except orjson.JSONDecodeError as error:
        raise Malformed(f"the record is no JSON: {error}") from None
    except RecursionError:
        raise Malformed("the record is nested too deeply") from None


def _message(schema: Mapping[str, tuple[int, _Write]], value: Any) -> bytes:
    if not isinstance(value, dict):
        raise Malformed(f"an object is needed, not {type(value).__name__}")
    parts: list[bytes] = []
    for name, (number, write) in schema.items():
        found = cast("dict[str, Any]", value).get(name)
        if found is None:
            continue
        try:
            parts.append(write(number, found))
        except Malformed as error:
            raise Malformed(f"{name}: {error}" if ":" not in str(error) else f"{name}.{error}") from None
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            raise Malformed(f"{name}: {error}") from None
    return b"".join(parts)


def _sub(schema: Mapping[str, tuple[int, _Write]]) -> _Write:
    return lambda number, value: length_field(number, _message(schema, value))


def _many(write: _Write) -> _Write:
    def write_all(number: int, value: Any) -> bytes:
        if not isinstance(value, list):
            raise Malformed(f"a list is needed, not {type(value).__name__}")
        return b"".join(write(number, one) for one in cast("list[Any]", value))

    return write_all


def _text(number: int, value: Any) -> bytes:
    if not isinstance(value, str):
        raise Malformed(f"a text is needed, not {type(value).__name__}")
    return length_field(number, value.encode())


def _hex(number: int, value: Any) -> bytes:
    return length_field(number, bytes.fromhex(value))


def _base64(number: int, value: Any) -> bytes:
    try:
        return length_field(number, b64decode(value, validate=True))
    except binascii.Error as error:
        raise Malformed(str(error)) from None


def _integer(value: Any) -> int:
    if isinstance(value, float | bool):
        raise Malformed("an integer is needed")
    number = int(value)
    if not -(2**63) <= number < 2**64:
        raise Malformed("the number does not fit into 64 bits")
    return number


def _number(number: int, value: Any) -> bytes:
    return number_field(number, _integer(value))


def _fixed64(number: int, value: Any) -> bytes:
    return varint(number << 3 | FIXED64) + struct.pack("<Q", _integer(value))


def _double(number: int, value: Any) -> bytes:
    return varint(number << 3 | FIXED64) + struct.pack("<d", float(value))


def _bool(number: int, value: Any) -> bytes:
    if not isinstance(value, bool):
        raise Malformed("true or false is needed")
    return number_field(number, int(value))


def _enum(prefix: str, names: tuple[str, ...]) -> _Write:
    def write(number: int, value: Any) -> bytes:
        if isinstance(value, str) and value.removeprefix(prefix) in names:
            value = names.index(value.removeprefix(prefix))
        return _number(number, value)

    return write


def _any(number: int, value: Any) -> bytes:
    return length_field(number, _message(_ANY, value))


def _attribute(number: int, value: Any) -> bytes:
    return length_field(number, _message(_KEY_VALUE, value))


_KEY_VALUE: Final[Mapping[str, tuple[int, _Write]]] = {"key": (1, _text), "value": (2, _any)}
_ANY: Final[Mapping[str, tuple[int, _Write]]] = {
    "stringValue": (1, _text),
    "boolValue": (2, _bool),
    "intValue": (3, _number),
    "doubleValue": (4, _double),
    "arrayValue": (5, _sub({"values": (1, _many(_any))})),
    "kvlistValue": (6, _sub({"values": (1, _many(_attribute))})),
    "bytesValue": (7, _base64),
}
_ATTRIBUTES = _many(_attribute)
_EVENT: Final[Mapping[str, tuple[int, _Write]]] = {
    "timeUnixNano": (1, _fixed64),
    "name": (2, _text),
    "attributes": (3, _ATTRIBUTES),
    "droppedAttributesCount": (4, _number),
}
_LINK: Final[Mapping[str, tuple[int, _Write]]] = {
    "traceId": (1, _hex),
    "spanId": (2, _hex),
    "traceState": (3, _text),
    "attributes": (4, _ATTRIBUTES),
    "droppedAttributesCount": (5, _number),
}
_SPAN: Final[Mapping[str, tuple[int, _Write]]] = {
    "traceId": (1, _hex),
    "spanId": (2, _hex),
    "traceState": (3, _text),
    "parentSpanId": (4, _hex),
    "name": (5, _text),
    "kind": (6, _enum("SPAN_KIND_", _KINDS)),
    "startTimeUnixNano": (7, _fixed64),
    "endTimeUnixNano": (8, _fixed64),
    "attributes": (9, _ATTRIBUTES),
    "droppedAttributesCount": (10, _number),
    "events": (11, _many(_sub(_EVENT))),
    "droppedEventsCount": (12, _number),
    "links": (13, _many(_sub(_LINK))),
    "droppedLinksCount": (14, _number),
    "status": (15, _sub({"message": (2, _text), "code": (3, _enum("STATUS_CODE_", _CODES))})),
}
_SCOPE_SPANS: Final[Mapping[str, tuple[int, _Write]]] = {
    "scope": (1, _sub({"name": (1, _text), "version": (2, _text), "attributes": (3, _ATTRIBUTES)})),
    "spans": (2, _many(_sub(_SPAN))),
}
_RESOURCE_SPANS: Final[Mapping[str, tuple[int, _Write]]] = {
    "resource": (1, _sub({"attributes": (1, _ATTRIBUTES)})),
    "scopeSpans": (2, _many(_sub(_SCOPE_SPANS))),
}
_TRACES: Final[Mapping[str, tuple[int, _Write]]] = {"resourceSpans": (1, _many(_sub(_RESOURCE_SPANS)))}

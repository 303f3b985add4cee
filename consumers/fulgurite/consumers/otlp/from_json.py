"""OTLP JSON (a TracesData as the Collector's encoding otlp_json writes it) as OTLP protobuf, so that everything behind
has one form to read. JSON is for trying things out, protobuf for volume.

Promises: the same spans, field by field: ids from hex (or base64, as protobuf's own JSON has them), 64-bit numbers from
texts or numbers, an attribute's that no int64 holds as a text; half a surrogate pair and bytes that are no UTF-8 become
the replacement character, as in protobuf; fields this version does not know are left out, as protobuf's own JSON
readers do. A span that cannot be read, or whose resource or scope cannot be, comes as a broken one (mend.py) and leaves
the others alone. Raises Malformed where there are no spans to tell apart: what is wrong, and where.
"""

from __future__ import annotations

import binascii
import re
import struct
from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import orjson

from fulgurite.consumers.otlp.mend import broken
from fulgurite.consumers.otlp.wire import FIXED64, Malformed, length_field, number_field, varint

_Write = Callable[[int, Any], bytes]
_Schema = Mapping[str, tuple[int, _Write]]
"""Name of a field -> its number, and what writes it."""

_ESCAPES: Final = re.compile(
    rb"(\\(?:[^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))|\\u[dD][89a-fA-F][0-9a-fA-F]{2}", re.DOTALL
)
"""The second: half a surrogate pair."""

_KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_CODES = ("UNSET", "OK", "ERROR")


def from_json(value: bytes) -> bytes:
    """The record's value as protobuf."""
    try:
        return _message(_TRACES, _loaded(value))
    except orjson.JSONDecodeError as error:
        raise Malformed(f"the record is no JSON: {error}") from None


def _loaded(value: bytes) -> Any:
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        text = _ESCAPES.sub(lambda found: found[1] or b"\\ufffd", value).decode(errors="replace")
        return orjson.loads(text)


def _resource_spans(number: int, value: Any) -> bytes:
    tree = _object(value)
    resource, why = _shared(1, "resource", _RESOURCE, tree)
    return length_field(number, resource + _each(tree, "scopeSpans", lambda one: _scope_spans(one, why)))


def _scope_spans(value: Any, why: str) -> bytes:
    tree = _object(value)
    scope, wrong = _shared(1, "scope", _SCOPE, tree)
    return length_field(2, scope + _each(tree, "spans", lambda one: length_field(2, _span(one, why or wrong))))


def _shared(number: int, name: str, schema: _Schema, tree: dict[str, Any]) -> tuple[bytes, str]:
    """What the spans of a message share, and why it cannot be read."""
    try:
        return (length_field(number, _message(schema, tree[name])) if tree.get(name) is not None else b""), ""
    except (Malformed, RecursionError) as error:
        return b"", _reason(f"{name}.", error)


def _span(value: Any, why: str) -> bytes:
    if not why:
        try:
            return _message(_SPAN, value)
        except (Malformed, RecursionError) as error:
            why = _reason("", error)
    try:
        return broken(orjson.dumps(value), why)
    except orjson.JSONEncodeError:  # too deep to be written again
        return broken(b"", why)


def _reason(where: str, error: Malformed | RecursionError) -> str:
    return f"{where}{error}" if isinstance(error, Malformed) else f"{where}attributes: nested too deeply"


def _each(tree: dict[str, Any], name: str, write: Callable[[Any], bytes]) -> bytes:
    try:
        return b"".join(write(one) for one in _list(tree.get(name) or []))
    except Malformed as error:
        raise Malformed(f"{name}: {error}") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"an object is needed, not {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed(f"a list is needed, not {type(value).__name__}")
    return cast("list[Any]", value)


def _message(schema: _Schema, value: Any) -> bytes:
    tree = _object(value)
    parts: list[bytes] = []
    for name, (number, write) in schema.items():
        found = tree.get(name)
        if found is None:
            continue
        try:
            parts.append(write(number, found))
        except Malformed as error:
            raise Malformed(f"{name}: {error}" if ":" not in str(error) else f"{name}.{error}") from None
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            raise Malformed(f"{name}: {error}") from None
    return b"".join(parts)


def _sub(schema: _Schema) -> _Write:
    return lambda number, value: length_field(number, _message(schema, value))


def _many(write: _Write) -> _Write:
    def write_all(number: int, value: Any) -> bytes:
        return b"".join(write(number, one) for one in _list(value))

    return write_all


def _text(number: int, value: Any) -> bytes:
    if not isinstance(value, str):
        raise Malformed(f"a text is needed, not {type(value).__name__}")
    return length_field(number, value.encode())


def _id(number: int, value: Any) -> bytes:
    """Hex, as OTLP says, or base64 of 8 or 16 bytes, as protobuf says: their lengths differ."""
    if isinstance(value, str) and len(value) in (12, 24) and value.endswith("="):
        return _base64(number, value)
    return length_field(number, bytes.fromhex(value))


def _base64(number: int, value: Any) -> bytes:
    """Either alphabet, with or without its padding, as protobuf says."""
    try:
        text = str(value).rstrip("=").replace("-", "+").replace("_", "/")
        return length_field(number, b64decode(text + "=" * (-len(text) % 4), validate=True))
    except binascii.Error as error:
        raise Malformed(str(error)) from None


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
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


def _int(number: int, value: Any) -> bytes:
    found = _integer(value)
    return number_field(number, found) if found < 2**63 else _text(_STRING_VALUE, str(found))


def _any(number: int, value: Any) -> bytes:
    return length_field(number, _message(_ANY, value))


def _attribute(number: int, value: Any) -> bytes:
    return length_field(number, _message(_KEY_VALUE, value))


_STRING_VALUE: Final = 1
_KEY_VALUE: Final[_Schema] = {"key": (1, _text), "value": (2, _any)}
_ANY: Final[_Schema] = {
    "stringValue": (_STRING_VALUE, _text),
    "boolValue": (2, _bool),
    "intValue": (3, _int),
    "doubleValue": (4, _double),
    "arrayValue": (5, _sub({"values": (1, _many(_any))})),
    "kvlistValue": (6, _sub({"values": (1, _many(_attribute))})),
    "bytesValue": (7, _base64),
}
_ATTRIBUTES = _many(_attribute)
_EVENT: Final[_Schema] = {
    "timeUnixNano": (1, _fixed64),
    "name": (2, _text),
    "attributes": (3, _ATTRIBUTES),
    "droppedAttributesCount": (4, _number),
}
_LINK: Final[_Schema] = {
    "traceId": (1, _id),
    "spanId": (2, _id),
    "traceState": (3, _text),
    "attributes": (4, _ATTRIBUTES),
    "droppedAttributesCount": (5, _number),
}
_SPAN: Final[_Schema] = {
    "traceId": (1, _id),
    "spanId": (2, _id),
    "traceState": (3, _text),
    "parentSpanId": (4, _id),
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
_SCOPE: Final[_Schema] = {
    "name": (1, _text),
    "version": (2, _text),
    "attributes": (3, _ATTRIBUTES),
}
_RESOURCE: Final[_Schema] = {"attributes": (1, _ATTRIBUTES)}
_TRACES: Final[_Schema] = {"resourceSpans": (1, _many(_resource_spans))}

"""OTLP spans written for tests: straight from the proto files, by nothing that the code under test uses."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRACE = bytes(range(16))
SPAN = bytes(range(8))
START = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class Record:
    """As aiokafka's."""

    offset: int
    value: bytes | None
    key: bytes | None = b"k"
    timestamp: int = 1_700_000_000_000
    headers: Sequence[tuple[str, bytes]] = ()


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def part(field: int, data: bytes) -> bytes:
    return number(field * 8 + 2) + number(len(data)) + data


def integer(field: int, value: int) -> bytes:
    return number(field * 8) + number(value % 2**64)


def fixed(field: int, value: int) -> bytes:
    return number(field * 8 + 1) + struct.pack("<Q", value)


def any_value(value: Any) -> bytes:
    match value:
        case None:
            return b""
        case bool():
            return integer(2, int(value))
        case str():
            return part(1, value.encode())
        case int():
            return integer(3, value)
        case float():
            return number(4 * 8 + 1) + struct.pack("<d", value)
        case bytes():
            return part(7, value)
        case list():
            return part(5, b"".join(part(1, any_value(one)) for one in value))
        case _:
            return part(6, attributes(1, value))


def attributes(field: int, values: Mapping[str, Any]) -> bytes:
    return b"".join(part(field, part(1, key.encode()) + part(2, any_value(one))) for key, one in values.items())


def event(name: str, values: Mapping[str, Any], time_ns: int = START) -> bytes:
    return fixed(1, time_ns) + part(2, name.encode()) + attributes(3, values)


def link(values: Mapping[str, Any], trace: bytes = TRACE, span_id: bytes = SPAN) -> bytes:
    return part(1, trace) + part(2, span_id) + attributes(4, values)


def span(
    values: Mapping[str, Any] | None = None,
    *,
    name: str = "step",
    trace: bytes = TRACE,
    span_id: bytes = SPAN,
    start: int = START,
    end: int = START + 1_000,
    kind: int = 1,
    events: Sequence[bytes] = (),
    links: Sequence[bytes] = (),
    more: bytes = b"",
) -> bytes:
    return b"".join(
        (
            part(1, trace),
            part(2, span_id),
            part(5, name.encode()),
            integer(6, kind),
            fixed(7, start),
            fixed(8, end),
            attributes(9, values or {}),
            *(part(11, one) for one in events),
            *(part(13, one) for one in links),
            more,
        )
    )


def scope_spans(
    spans: Sequence[bytes], name: str = "", version: str = "", values: Mapping[str, Any] | None = None
) -> bytes:
    names = part(1, name.encode()) + part(2, version.encode()) if name or version else b""
    scope = names + attributes(3, values or {})
    return (part(1, scope) if scope else b"") + b"".join(part(2, one) for one in spans)


def resource_spans(resource: Mapping[str, Any], *scopes: bytes) -> bytes:
    return part(1, attributes(1, resource)) + b"".join(part(2, scope) for scope in scopes)


def traces(*resources: bytes) -> bytes:
    return b"".join(part(1, one) for one in resources)


def record(*spans: bytes, resource: Mapping[str, Any] | None = None) -> bytes:
    """A TracesData of one ScopeSpans."""
    return traces(resource_spans(resource or {}, scope_spans(spans)))

"""OTLP protobuf decoded in Python, for the few records that somebody has to look into (the translator) and for tests.

Promises: every span of the record in its order, with its place in the record (`index`, as ClickHouse counts it); values
of any depth as Python values. Raises Malformed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fulgurite.consumers.otlp.wire import FIXED64, LENGTH, VARINT, Malformed, fields, read_double, read_fixed64

MAX_DEPTH = 64
"""Of nested values; deeper ones are an attack."""

Attributes = dict[str, Any]


@dataclass(slots=True)
class OtlpEvent:
    name: str = ""
    time_ns: int = 0
    attributes: Attributes = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class OtlpLink:
    trace_id: str = ""
    span_id: str = ""
    attributes: Attributes = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class OtlpSpan:
    index: int
    resource: Attributes
    scope_name: str = ""
    scope_version: str = ""
    trace_id: str = ""
    span_id: str = ""
    parent_span_id: str = ""
    name: str = ""
    kind: int = 0
    status: int = 0
    status_message: str = ""
    start_ns: int = 0
    end_ns: int = 0
    attributes: Attributes = field(default_factory=dict[str, Any])
    events: list[OtlpEvent] = field(default_factory=list[OtlpEvent])
    links: list[OtlpLink] = field(default_factory=list[OtlpLink])


def decode(data: bytes) -> list[OtlpSpan]:
    """The spans of a TracesData."""
    spans: list[OtlpSpan] = []
    for number, kind, start, stop in fields(data, 0, len(data)):
        if number == 1 and kind == LENGTH:
            _resource_spans(data, start, stop, spans)
    return spans


def _resource_spans(data: bytes, at: int, end: int, spans: list[OtlpSpan]) -> None:
    resource: Attributes = {}
    scopes: list[tuple[int, int]] = []
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            resource |= dict(_attributes(data, start, stop, 1))
        elif number == 2 and kind == LENGTH:
            scopes.append((start, stop))
    for start, stop in scopes:
        _scope_spans(data, start, stop, resource, spans)


def _scope_spans(data: bytes, at: int, end: int, resource: Attributes, spans: list[OtlpSpan]) -> None:
    name = version = ""
    found: list[tuple[int, int]] = []
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            for inner, wire, a, b in fields(data, start, stop):
                if wire == LENGTH and inner == 1:
                    name = _text(data, a, b)
                elif wire == LENGTH and inner == 2:
                    version = _text(data, a, b)
        elif number == 2 and kind == LENGTH:
            found.append((start, stop))
    for start, stop in found:
        spans.append(_span(data, start, stop, OtlpSpan(len(spans), resource, name, version)))


def _span(data: bytes, at: int, end: int, span: OtlpSpan) -> OtlpSpan:
    for number, kind, start, stop in fields(data, at, end):
        match number, kind:
            case 1, 2:
                span.trace_id = data[start:stop].hex()
            case 2, 2:
                span.span_id = data[start:stop].hex()
            case 4, 2:
                span.parent_span_id = data[start:stop].hex()
            case 5, 2:
                span.name = _text(data, start, stop)
            case 6, 0:
                span.kind = start
            case 7, 1:
                span.start_ns = read_fixed64(data, start)
            case 8, 1:
                span.end_ns = read_fixed64(data, start)
            case 9, 2:
                _put(span.attributes, _pair(data, start, stop, 0))
            case 11, 2:
                span.events.append(_event(data, start, stop))
            case 13, 2:
                span.links.append(_link(data, start, stop))
            case 15, 2:
                for inner, wire, a, b in fields(data, start, stop):
                    if inner == 2 and wire == LENGTH:
                        span.status_message = _text(data, a, b)
                    elif inner == 3 and wire == VARINT:
                        span.status = a
            case _:
                pass
    return span


def _event(data: bytes, at: int, end: int) -> OtlpEvent:
    event = OtlpEvent(attributes=dict(_attributes(data, at, end, 3)))
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == FIXED64:
            event.time_ns = read_fixed64(data, start)
        elif number == 2 and kind == LENGTH:
            event.name = _text(data, start, stop)
    return event


def _link(data: bytes, at: int, end: int) -> OtlpLink:
    link = OtlpLink(attributes=dict(_attributes(data, at, end, 4)))
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            link.trace_id = data[start:stop].hex()
        elif number == 2 and kind == LENGTH:
            link.span_id = data[start:stop].hex()
    return link


def _attributes(data: bytes, at: int, end: int, wanted: int) -> Iterator[tuple[str, Any]]:
    for number, kind, start, stop in fields(data, at, end):
        if number == wanted and kind == LENGTH:
            yield _pair(data, start, stop, 0)


def _put(attributes: Attributes, pair: tuple[str, Any]) -> None:
    attributes.setdefault(*pair)  # of a name that stands twice the first counts, as in ClickHouse


def _pair(data: bytes, at: int, end: int, depth: int) -> tuple[str, Any]:
    key, value = "", None
    for number, kind, start, stop in fields(data, at, end):
        if number == 1 and kind == LENGTH:
            key = _text(data, start, stop)
        elif number == 2 and kind == LENGTH:
            value = _value(data, start, stop, depth)
    return key, value


def _value(data: bytes, at: int, end: int, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise Malformed("a value is nested too deeply")
    value: Any = None
    for number, kind, start, stop in fields(data, at, end):
        match number, kind:
            case 1, 2:
                value = _text(data, start, stop)
            case 2, 0:
                value = bool(start)
            case 3, 0:
                value = start - 2**64 if start >= 2**63 else start
            case 4, 1:
                value = read_double(data, start)
            case 5, 2:
                inner = fields(data, start, stop)
                value = [_value(data, a, b, depth + 1) for n, wire, a, b in inner if n == 1 and wire == LENGTH]
            case 6, 2:
                inner = fields(data, start, stop)
                value = dict(_pair(data, a, b, depth + 1) for n, wire, a, b in inner if n == 1 and wire == LENGTH)
            case 7, 2:
                value = data[start:stop]
            case _:
                pass
    return value


def _text(data: bytes, start: int, stop: int) -> str:
    return data[start:stop].decode(errors="replace")

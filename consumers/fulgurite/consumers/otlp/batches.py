"""Kafka records of OTLP spans as the body of one insert. Python looks at no span: it finds where each ScopeSpans of a
record begins and ends, and writes a few bytes around it (schemas/otlp.proto, message Batch), which ClickHouse decodes.

    record = TracesData { ResourceSpans { Resource, ScopeSpans, ScopeSpans }, ResourceSpans { … } }
    body   = Batch { coordinates, first = 0,  Resource, ScopeSpans } Batch { coordinates, first = 40, … } …

`first` is the number of the Batch's first span within its record, so that `_index` counts over the whole record. A
record that begins with "{" is OTLP JSON (the Collector's encoding otlp_json) and becomes the same bytes first.
Attributes of a scope, which hardly anybody has, become some of the resource, under SCOPE_PREFIX.

ClickHouse refuses a body with a value that is nested too deeply for its schema, or with broken bytes: nothing of the
insert is in the tables then, and the same records are tried again with `mend` (mend.py), which looks into each span.

Promises: the order of records, ScopeSpans and spans; nothing of a span is left out; every record has a span. Raises
MalformedRecords where the outer messages are none; what is wrong within them, ClickHouse says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Final

from fulgurite.consumers.otlp.from_json import from_json
from fulgurite.consumers.otlp.mend import mended
from fulgurite.consumers.otlp.wire import LENGTH, Malformed, fields, length_field, number_field, read_varint, varint
from fulgurite.consumers.records import LogRecord

FORMAT: Final = "Protobuf"
REFUSALS: Final = frozenset({32, 33, 36, 434, 436, 444})
"""ClickHouse's error codes for a body that is no protobuf of this schema (found by breaking bytes): attempt to read
after the end, cannot read all data, two values of a oneof, and Protobuf's own."""
_OF_A_BATCH = ("_topic", "_partition", "_offset", "_ts", "key", "_into", "first")
_OF_A_SPAN = (
    *("trace", "id", "trace_state", "parent", "name", "kind", "begin", "end", "status"),
    *("attributes", "events", "links", "lost_attributes", "lost_events", "lost_links"),
)
COLUMNS: Final = (
    *_OF_A_BATCH,
    *("resource.attributes", "part.scope.name", "part.scope.version"),
    *(f"part.spans.{name}" for name in _OF_A_SPAN),
)


SCOPE_PREFIX: Final = b"otel.scope."
"""Before the name of a scope's attribute among those of the resource."""
_COMPRESSED: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""How no TracesData begins."""
_PART: Final = varint(9 << 3 | LENGTH)


class MalformedRecords(Malformed):
    """Records of which spans cannot be told apart. `why`: of each of them, by its offset."""

    def __init__(self, why: Mapping[int, str]) -> None:
        super().__init__(next(iter(why.values())))
        self.why = why


@cache
def insert_settings() -> Mapping[str, str | int]:
    """What ClickHouse must be told, beside FORMAT, to read a body."""
    return {
        "format_schema_source": "string",
        "format_schema": (files("fulgurite.schemas") / "otlp.proto").read_text("utf-8"),
        "format_schema_message_name": "Batch",
        # Which field of a oneof was there: 0, false and "" are values, too.
        "input_format_protobuf_oneof_presence": 1,
        # A view's ARRAY JOIN cuts its result at this many rows: one block in must stay one block.
        "max_block_size": 2**40,
        # What few spans need (JSON of dead letters, lists of tokens) is computed for those only: a fifth less time.
        "short_circuit_function_evaluation": "force_enable",
    }


def body(
    topic: str, partition: int, records: Sequence[LogRecord], into: Callable[[int], int], *, mend: bool = False
) -> bytes:
    """One insert into in_otlp_spans. `into(offset)` says which tables may take the record: see 0002_spans.sql. `mend`:
    these records were refused. Raises MalformedRecords."""
    place = length_field(1, topic.encode()) + number_field(2, partition)
    parts: list[bytes | memoryview] = []
    wrong: dict[int, str] = {}
    for record in records:
        try:
            found = _found(otlp(record.value), mend=mend)
        except Malformed as error:
            wrong[record.offset] = str(error)
            continue
        head = b"".join(
            (
                place,
                number_field(3, record.offset),
                number_field(4, max(record.timestamp, 0)),
                length_field(5, record.key or b""),
                number_field(6, into(record.offset)),
            )
        )
        for first, resource, spans in found:
            start = b"".join((head, number_field(7, first), resource, _PART, varint(len(spans))))
            parts += (varint(len(start) + len(spans)), start, spans)
    if wrong:
        raise MalformedRecords(wrong)
    return b"".join(parts)


def _found(value: bytes, *, mend: bool) -> list[tuple[int, bytes, memoryview]]:
    """Its ScopeSpans. One of which only a resource or a scope is broken within can be mended."""
    if not mend:
        with contextlib.suppress(Malformed):
            return scopes(value)
    return scopes(mended(value))


def otlp(value: bytes | None) -> bytes:
    """A record's value as protobuf. Raises Malformed."""
    if not value:
        raise Malformed("the record has no value")
    for start, name in _COMPRESSED.items():
        if value.startswith(start):
            raise Malformed(f"the value is compressed ({name}): let the Kafka client compress, which its readers undo")
    return from_json(value) if value[0] == 0x7B else value  # 0x7B, "{", would be a group in protobuf


def scopes(value: bytes) -> list[tuple[int, bytes, memoryview]]:
    """Of each ScopeSpans: the number of its first span in the record, its resource as the field 8, its own bytes."""
    found: list[tuple[bytes, memoryview]] = []
    view = memoryview(value)
    for number, kind, start, stop in fields(value, 0, len(value)):
        if number != 1 or kind != LENGTH:
            continue
        resource, inner = b"", list[memoryview]()
        for field, wire, begin, end in fields(value, start, stop):
            if field == 1 and wire == LENGTH:
                resource += length_field(8, value[begin:end])  # a message in two pieces is merged by its reader
            elif field == 2 and wire == LENGTH:
                inner.append(view[begin:end])
        found += ((resource, spans) for spans in inner)
    numbered: list[tuple[int, bytes, memoryview]] = []
    first = 0
    for place, (resource, spans) in enumerate(found):
        # The last one's spans need no numbers after them: most records have one ScopeSpans, and nothing is counted.
        count = _has_spans(spans) if place == len(found) - 1 else _count_spans(spans)
        if count:
            numbered.append((first, resource + _scope_attributes(spans), spans))
            first += count
    if not numbered:
        raise Malformed("the record has no spans")
    return numbered


def _scope_attributes(data: memoryview) -> bytes:
    """Those of the scope in front of a ScopeSpans' spans, as the field 8."""
    found = b""
    for number, kind, start, stop in fields(data, 0, len(data)):
        if number != 1 or kind != LENGTH:
            break
        for field, wire, begin, end in fields(data, start, stop):
            if field != 3 or wire != LENGTH:
                continue
            pair = {n: bytes(data[a:b]) for n, w, a, b in fields(data, begin, end) if w == LENGTH}
            name, value = length_field(1, SCOPE_PREFIX + pair.get(1, b"")), length_field(2, pair.get(2, b""))
            found += length_field(8, length_field(1, name + value))
    return found


def _has_spans(data: memoryview) -> int:
    return int(any(number == 2 and kind == LENGTH for number, kind, _, _ in fields(data, 0, len(data))))


def _count_spans(data: memoryview) -> int:
    """How many fields number 2 a ScopeSpans has; for the usual ones in a third of the time that `fields` takes."""
    at, end, count = 0, len(data), 0
    while at < end:
        if data[at] != 0x12:
            number, kind, _, at = next(fields(data, at, end))
            count += number == 2 and kind == LENGTH
            continue
        length, at = (data[at + 1], at + 2) if at + 1 < end and data[at + 1] < 0x80 else read_varint(data, at + 1, end)
        at += length
        count += 1
    if at > end:
        raise Malformed("a span is cut off")
    return count

"""How large a record is once ClickHouse has it as rows: an upper estimate, in bytes, for records that alone fail.

An OTLP record of some hundred kB may be hundreds of MB there: each span gets the attributes of its resource. Pure.
"""

from __future__ import annotations

from typing import Final

from fulgurite.consumers.materialiser.blocks import LINE_TOPICS, Record
from fulgurite.consumers.materialiser.lines import line_feeds
from fulgurite.consumers.otlp.batches import otlp, scopes
from fulgurite.consumers.otlp.wire import LENGTH, Malformed, fields
from fulgurite.schemas.topics import OTLP_SPANS, Topic

_ROW_BYTES: Final = 512
"""Of a row that has next to nothing in it: ids, times, counts, and where strings and maps begin."""


def weight(topic: Topic, record: Record) -> int:
    """Takes as long as reading the record does."""
    value, key = record.value or b"", record.key or b""
    a_row = _ROW_BYTES + len(key) + sum(len(name) + len(text or b"") for name, text in record.headers)
    if topic is OTLP_SPANS:
        try:
            return _of_spans(otlp(value), a_row)
        except Malformed:
            return len(value) + a_row
    rows = line_feeds(value) + 1 if topic in LINE_TOPICS else 1
    return len(value) + rows * a_row


def _of_spans(value: bytes, a_row: int) -> int:
    total = len(value)
    for _, resource, part in scopes(value):
        spans = scope = 0
        for number, kind, at, stop in fields(part, 0, len(part)):
            if kind == LENGTH:
                spans, scope = (spans + 1, scope) if number == 2 else (spans, scope + stop - at)
        total += spans * (a_row + len(resource) + scope)
    return total

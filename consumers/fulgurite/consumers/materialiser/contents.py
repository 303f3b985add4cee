"""What one insert carries: records as rows of an input table, or as dead letters. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from fulgurite.consumers.materialiser.blocks import (
    Letter,
    Partition,
    Slice,
    Unreadable,
    arrow,
    block,
    dead_block,
    missing,
)
from fulgurite.consumers.materialiser.errors import REJECTED_CODES
from fulgurite.consumers.otlp import batches
from fulgurite.consumers.otlp.to_json import to_json
from fulgurite.consumers.otlp.wire import Malformed
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas import topics

BEGINNING_BYTES: Final = 1 << 20
"""What is kept of a record that is too large even as a dead letter: Kafka's bound is on what is compressed."""


@dataclass(frozen=True, slots=True)
class Body:
    """What one insert carries."""

    columns: Sequence[str]
    data: Sequence[bytes | memoryview]
    """In pieces."""
    format: str
    settings: Mapping[str, str | int]
    refusals: frozenset[int]
    """ClickHouse's error codes that say: not these data."""


def body(slices: Sequence[Slice], *, mend: bool = False) -> Body:
    """Raises Unreadable, of all the records that are not what they should be."""
    if slices[0].partition.topic is not topics.OTLP_SPANS:
        return arrow_body(block(slices))
    data: list[bytes] = []
    why: dict[tuple[Partition, int], str] = {}
    for part in slices:
        try:
            data.append(_otlp(part, mend=mend))
        except batches.MalformedRecords as error:
            why |= {(part.partition, offset): text for offset, text in error.why.items()}
    if why:
        raise Unreadable(why)
    return Body(batches.COLUMNS, data, batches.FORMAT, batches.insert_settings(), REJECTED_CODES | batches.REFUSALS)


def dead_body(letters: Sequence[Letter], redactor: Redactor | None) -> Body:
    """Records that no table takes."""
    return arrow_body(dead_block([_kept(letter, redactor) for letter in letters]))


def refused(one: Slice, message: str, reason: str) -> list[Letter]:
    """Of its one record."""
    return [Letter(one.partition, one.records[0], message, reason)]


def undecodable(part: Slice) -> list[Letter]:
    """Those of its records that are `Undecodable`."""
    return [
        Letter(part.partition, record, record.why, "undecodable")
        for record in part.records
        if isinstance(record, Undecodable)
    ]


def unreadable(dead: Sequence[Slice], error: Unreadable) -> list[Letter]:
    """Of all their records."""
    return [
        Letter(part.partition, record, error.why[part.partition, record.offset])
        for part in dead
        for record in part.records
    ]


def beginning(letter: Letter) -> Letter | None:
    """Of one that is too large even as a letter, what is kept; None of one that is not."""
    value = letter.value or letter.record.value or b""
    if len(value) <= BEGINNING_BYTES:
        return None
    said = f"{letter.message} (kept are the first {BEGINNING_BYTES:,} of its {len(value):,} bytes: Kafka has them all)"
    return letter._replace(message=said, value=value[:BEGINNING_BYTES])


def _kept(letter: Letter, redactor: Redactor | None) -> Letter:
    """Parts that rules take out of protobuf leave bytes that nobody can read: there it is kept as OTLP JSON, of which
    the view takes them out."""
    value = letter.record.value
    if redactor is None or not value or letter.partition.topic is not topics.OTLP_SPANS or value.startswith(b"{"):
        return letter
    try:
        text = to_json(value)
    except Malformed:
        return letter  # nobody can read it as it is
    if redactor.letter(value) == value and redactor.letter(text) == text:
        return letter
    said = f"{letter.message} (kept as OTLP JSON: rules of redaction take out parts of it)"
    return letter._replace(message=said, value=text)


def _otlp(part: Slice, *, mend: bool) -> bytes:
    def into(offset: int) -> int:
        return missing(topics.OTLP_SPANS, part.present.get(offset, 0))

    return batches.body(part.partition.name, part.partition.number, part.records, into, mend=mend)


def arrow_body(table: pa.Table) -> Body:
    """For a table or an input table that takes Arrow."""
    return Body(table.column_names, arrow(table), "ArrowStream", {}, REJECTED_CODES)

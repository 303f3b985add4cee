"""What one insert carries: records as rows of an input table, or as dead letters. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from fulgurite.consumers.materialiser.blocks import (
    Partition,
    Record,
    Slice,
    TooManyLines,
    arrow,
    block,
    dead_block,
    missing,
)
from fulgurite.consumers.materialiser.errors import REJECTED_CODES, Rejected
from fulgurite.consumers.otlp import batches
from fulgurite.consumers.otlp.to_json import to_json
from fulgurite.consumers.otlp.wire import Malformed
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas import topics


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
    """Raises Rejected where there is nothing to send to the server, because it is not what it should be."""
    if slices[0].partition.topic is not topics.OTLP_SPANS:
        try:
            return arrow_body(block(slices))
        except TooManyLines as error:
            raise Rejected(str(error)) from error
    try:
        data = [_otlp(part, mend=mend) for part in slices]
    except Malformed as error:
        raise Rejected(str(error)) from error
    return Body(batches.COLUMNS, data, batches.FORMAT, batches.insert_settings(), REJECTED_CODES | batches.REFUSALS)


def dead_body(one: Slice, message: str, redactor: Redactor | None, reason: str = "rejected") -> Body:
    """A record that no table takes."""
    return arrow_body(_kept(one.partition, one.records[0], message, reason, redactor))


def undecodable_body(part: Slice, redactor: Redactor | None) -> Body:
    """Those of its records that are `Undecodable`."""
    lost = [record for record in part.records if isinstance(record, Undecodable)]
    return arrow_body(
        pa.concat_tables([_kept(part.partition, record, record.why, "undecodable", redactor) for record in lost])
    )


def _kept(partition: Partition, record: Record, message: str, reason: str, redactor: Redactor | None) -> pa.Table:
    """A record as its row of dead_letters. Parts that rules take out of protobuf leave bytes that nobody can read:
    there it is kept as OTLP JSON, of which the view takes them out."""
    value = record.value
    if redactor is not None and value and partition.topic is topics.OTLP_SPANS and not value.startswith(b"{"):
        try:
            text = to_json(value)
        except Malformed:
            text = b""  # nobody can read it as it is
        if text and (redactor.letter(value) != value or redactor.letter(text) != text):
            said = f"{message} (kept as OTLP JSON: rules of redaction take out parts of it)"
            return dead_block(partition, record, said, reason, text)
    return dead_block(partition, record, message, reason)


def _otlp(part: Slice, *, mend: bool) -> bytes:
    def into(offset: int) -> int:
        return missing(topics.OTLP_SPANS, part.present.get(offset, 0))

    return batches.body(part.partition.name, part.partition.number, part.records, into, mend=mend)


def arrow_body(table: pa.Table) -> Body:
    """For a table or an input table that takes Arrow."""
    return Body(table.column_names, arrow(table), "ArrowStream", {}, REJECTED_CODES)

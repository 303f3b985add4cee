"""Records as Arrow: what one insert carries. Pure functions; they look for the ends of lines and decode nothing.

A record of most topics is a row. A record of LINE_TOPICS holds one JSON object or several, one a line, and each line is
a row: `_index` is the line's number in its record, `_into` the tables that may take it. Records of all partitions of a
topic lie in one block. Promises: a record is never without a row (an empty one gives a row that becomes a dead letter);
one chunk a column, so that the server sees one block, of which a table takes all rows of a record or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fulgurite.consumers.materialiser.lines import all_lines, line_feeds
from fulgurite.consumers.records import LogRecord
from fulgurite.producers.raw import Undecodable
from fulgurite.schemas.topics import OTLP_SPANS, REWARDS, SPANS, Topic

LINE_TOPICS: Final = frozenset({SPANS, REWARDS})

SPLIT_TOPICS: Final = LINE_TOPICS | {OTLP_SPANS}
"""A record of theirs is several rows, which may lie in its own table and in dead_letters."""

OWN_TABLE: Final = 1
DEAD_LETTERS_TABLE: Final = 2
BOTH_TABLES: Final = OWN_TABLE | DEAD_LETTERS_TABLE
TOO_LARGE: Final = "too_large"
TOO_SLOW: Final = "too_slow"
GIVEN_UP: Final = (TOO_LARGE, TOO_SLOW)
"""Reasons of the materialiser's dead letters that are all of a record, of which alone no insert succeeds."""

MAX_LINES: Final = 200_000
"""Of a record: each is a row, which needs memory however short its line is. Some 8 MiB of ever so short ones would take
more than an engine has."""


OffsetRange = tuple[int, int]
"""First and last."""


class Record(LogRecord, Protocol):
    """A record with its headers."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of one topic, by the topic's full name."""

    topic: Topic
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}-{self.number}"


@dataclass(frozen=True, slots=True)
class Slice:
    """Records of one partition, in the order of the log, for an insert."""

    partition: Partition
    records: Sequence[Record]
    present: Mapping[int, int] = field(default_factory=dict[int, int])
    """By offset: the tables that have rows of a record already, OWN_TABLE, DEAD_LETTERS_TABLE or their sum."""
    fence: str = ""
    """Of whoever inserts them: see fences.py."""
    mark: int | None = None
    """Where an entry begins that the log of inserts has of the partition: it goes back where that is gone."""


class Unreadable(Exception):
    """Some records hold no rows that can be told apart, or too many: no server needs to be asked. `why`: of each of
    them, by partition and offset."""

    def __init__(self, why: Mapping[tuple[Partition, int], str]) -> None:
        super().__init__(next(iter(why.values())))
        self.why = why


class Letter(NamedTuple):
    """A record that no table takes."""

    partition: Partition
    record: Record
    message: str
    reason: str = "rejected"
    value: bytes | None = None
    """In place of its own."""


def missing(topic: Topic, present: int) -> int:
    """Of the tables that may take a record, those that may still lack rows of it; `present` are those that have some.

    A record of lines may have rows in both, the good lines in one and the bad ones in the other. Every other record is
    one row of one table.
    """
    if topic in SPLIT_TOPICS:
        return BOTH_TABLES & ~present
    return 0 if present else BOTH_TABLES


def halves(slices: Sequence[Slice]) -> Iterator[list[Slice]]:
    """The records in two halves, of which neither is empty where there are two."""
    left = sum(len(part.records) for part in slices) // 2
    first: list[Slice] = []
    second: list[Slice] = []
    for part in slices:
        cut = min(left, len(part.records))
        left -= cut
        for half, records in ((first, part.records[:cut]), (second, part.records[cut:])):
            if records:
                half.append(replace(part, records=records))
    yield from filter(None, (first, second))


def parted(slices: Sequence[Slice]) -> tuple[Sequence[Slice], list[Slice]]:
    """What is for the input table, and of what is undecodable that which no dead letter is there of."""
    if not any(isinstance(record, Undecodable) for part in slices for record in part.records):
        return slices, []
    return _apart(slices, lambda part, record: isinstance(record, Undecodable))


def readable(slices: Sequence[Slice], error: Unreadable) -> tuple[list[Slice], list[Slice]]:
    """The others, and of those that are not readable what no dead letter is there of."""
    return _apart(slices, lambda part, record: (part.partition, record.offset) in error.why)


def _apart(slices: Sequence[Slice], is_dead: Callable[[Slice, Record], bool]) -> tuple[list[Slice], list[Slice]]:
    good: list[Slice] = []
    dead: list[Slice] = []
    for part in slices:
        whole: list[Record] = []
        lost: list[Record] = []
        for record in part.records:
            if not is_dead(part, record):
                whole.append(record)
            elif not part.present.get(record.offset, 0) & DEAD_LETTERS_TABLE:
                lost.append(record)
        good += [replace(part, records=whole)] if whole else []
        dead += [replace(part, records=lost)] if lost else []
    return good, dead


def block(slices: Sequence[Slice]) -> pa.Table:
    """The records as rows. Of each of them a table lacks its part (`missing`). Raises Unreadable."""
    if slices[0].partition.topic in LINE_TOPICS:
        return _lines_block(slices)
    return _records_block(slices)


def arrow(table: pa.Table) -> list[memoryview]:
    """Arrow's stream format, everything in one record batch: a body cut short holds all of it or nothing. In pieces,
    which are the columns where they lie: nothing is copied."""
    sink = _Pieces()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.found


class _Pieces:
    """What Arrow writes to, as to a file."""

    closed = False

    def __init__(self) -> None:
        self.found: list[memoryview] = []

    def write(self, data: bytes | pa.Buffer) -> int:
        self.found.append(memoryview(data))
        return len(self.found[-1])

    def flush(self) -> None:
        """Nothing is kept back."""


def _lines_block(slices: Sequence[Slice]) -> pa.Table:
    topic, name = slices[0].partition.topic, slices[0].partition.name
    records = [record for part in slices for record in part.records]
    total = len(records)
    keys = pa.array([record.key or b"" for record in records], pa.binary()).dictionary_encode()
    order = _order(keys)
    values = [records[place].value or b"" for place in order.tolist()]
    if any(len(value) > MAX_LINES for value in values):
        _look_for_too_many_lines(slices)
    lines = all_lines(values)
    # Of each row, its record.
    row_of = np.repeat(order, lines.counts)
    numbers = np.array([part.partition.number for part in slices], np.uint32)
    partitions = np.repeat(numbers, [len(part.records) for part in slices])
    offsets = np.array([record.offset for record in records], np.uint64)
    times = np.array([record.timestamp for record in records], np.int64)
    into = np.full(total, BOTH_TABLES, np.uint8)
    if any(part.present for part in slices):
        lacking = [missing(topic, part.present.get(record.offset, 0)) for part in slices for record in part.records]
        into = np.array(lacking, np.uint8)
    return pa.table(
        {
            "raw": lines.raw,
            "key": keys.take(pa.array(row_of)),
            "_topic": _constant(name, len(lines.raw)),
            "_partition": pa.array(partitions[row_of]),
            "_offset": pa.array(offsets[row_of]),
            "_index": pa.array(lines.numbers),
            "_ts": pa.array(times[row_of]).cast(pa.timestamp("ms", "UTC")),
            "_into": pa.array(into[row_of]),
        }
    )


def _look_for_too_many_lines(slices: Sequence[Slice]) -> None:
    why = {
        (part.partition, record.offset): f"the record has {count + 1:,} lines, of at most {MAX_LINES:,}: send several "
        "records"
        for part in slices
        for record in part.records
        if len(value := record.value or b"") > MAX_LINES and (count := line_feeds(value)) > MAX_LINES
    }
    if why:
        raise Unreadable(why)


def _order(keys: pa.DictionaryArray) -> npt.NDArray[np.int64]:
    """Places by key, those of a key as they come. The tables are ordered by rollout: rows that come like this are not
    sorted again by the server."""
    known = keys.dictionary.to_pylist()
    rank = np.empty(len(known), np.int64)
    rank[sorted(range(len(known)), key=known.__getitem__)] = np.arange(len(known))
    return np.argsort(rank[keys.indices.to_numpy()], kind="stable")


def _records_block(slices: Sequence[Slice]) -> pa.Table:
    placed = [(part.partition.number, record) for part in slices for record in part.records]
    headers = pa.array(
        [[(name, value or b"") for name, value in record.headers] for _, record in placed],
        pa.map_(pa.string(), pa.binary()),
    )
    return pa.table(
        {
            "raw": pa.array([record.value or b"" for _, record in placed], pa.binary()),
            "key": pa.array([record.key or b"" for _, record in placed], pa.binary()),
            "headers": headers,
            "_topic": _constant(slices[0].partition.name, len(placed)),
            "_partition": pa.array([number for number, _ in placed], pa.uint32()),
            "_offset": pa.array([record.offset for _, record in placed], pa.uint64()),
            "_ts": pa.array([record.timestamp for _, record in placed], pa.timestamp("ms", "UTC")),
        }
    )


def dead_block(letters: Sequence[Letter]) -> pa.Table:
    """Records that ClickHouse refused, or never saw, as rows of dead_letters."""
    places = [letter.partition for letter in letters]
    records = [letter.record for letter in letters]
    names = [place.name for place in places]
    numbers = [place.number for place in places]
    offsets = [record.offset for record in records]
    fields: dict[str, tuple[Sequence[object], pa.DataType]] = {
        "topic": (names, pa.string()),
        "partition": (numbers, pa.int32()),
        "offset": (offsets, pa.int64()),
        "stage": (["materialiser"] * len(letters), pa.string()),
        "reason": ([letter.reason for letter in letters], pa.string()),
        "message": ([letter.message for letter in letters], pa.string()),
        "key": ([record.key or b"" for record in records], pa.binary()),
        "value": ([letter.value or letter.record.value or b"" for letter in letters], pa.binary()),
        "_topic": (names, pa.string()),
        "_partition": (numbers, pa.uint32()),
        "_offset": (offsets, pa.uint64()),
        # As numbers: a producer's clock may be of a year that datetime does not know.
        "_ts": ([max(record.timestamp, 0) for record in records], pa.timestamp("ms", "UTC")),
    }
    return pa.table({name: pa.array(values, kind) for name, (values, kind) in fields.items()})


def _constant(text: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))

"""One assigned partition: what was fetched and is not yet inserted, within bounds, and what is known of the tables.

Begins unsettled: nothing is taken before `settle` says, from the tables, where to begin and what to skip (step 0 of the
contract). Records that were taken for an insert come back with `give_back` when nobody knows what became of it; the
partition is unsettled again then, and goes on collecting. Knows nothing of ClickHouse or of other partitions.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiokafka import TopicPartition

from fulgurite.consumers.materialiser.blocks import (
    LINE_TOPICS,
    MAX_LINES,
    OffsetRange,
    Partition,
    Record,
    Slice,
    missing,
)
from fulgurite.consumers.materialiser.history import Incarnation
from fulgurite.consumers.materialiser.lines import line_feeds
from fulgurite.consumers.materialiser.metrics import Lag

BATCH_BYTES = 128 * 1024 * 1024
"""Most bytes of one insert, unless its first record alone is larger: ClickHouse parses a block in one piece, and holds
about six times as much meanwhile."""
BATCH_LINES = MAX_LINES
"""Most lines of one insert: a row needs memory however short its line is."""


class Consumer(Protocol):
    """What is needed of aiokafka's consumer."""

    def pause(self, *partitions: TopicPartition) -> None: ...
    def resume(self, *partitions: TopicPartition) -> None: ...
    def seek(self, partition: TopicPartition, offset: int) -> None: ...
    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...
    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...


@dataclass(slots=True)
class Budget:
    """Bytes that all partitions hold together, in buffers and in inserts. A few busy partitions may use most of it."""

    bytes: int = 0
    """Up to this nobody is limited to its share."""
    used: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """For one insert, or what is left of it."""

    records: int
    bytes: int = BATCH_BYTES
    lines: int = BATCH_LINES


class PartitionBuffer:
    """Give it records with `append`; `take` some, then `done` or `give_back`."""

    def __init__(
        self, partition: Partition, consumer: Consumer, budget: Budget, batch_records: int, share_bytes: int
    ) -> None:
        """`share_bytes`: of the budget, what it may hold whatever others do."""
        self.partition = partition
        self.tp = TopicPartition(partition.name, partition.number)
        self.settled = False
        """Whether it is known what the tables have of it, and that nobody else inserts there."""
        self.fence = ""
        self.mark: int | None = None
        """`lo` of an entry that the log of inserts has."""
        self.incarnation: Incarnation | None = None
        """Of the log, as it was when it was last settled."""
        self.try_at = 0.0
        """When, by the monotonic clock, it may be settled next."""
        self.closed = False
        self.bytes = 0
        """Of the buffer."""
        self.waiting_since = 0.0
        """When the buffer was last empty and got a record."""
        self.taken_at = 0.0
        """When, by the monotonic clock, records of it were last taken."""
        self.first = 0
        """Every record below is in the tables."""
        self._consumer = consumer
        self._budget = budget
        self._batch_records = batch_records
        # Asked of every record, and hashing a topic takes longer than all else that is done with one.
        self._has_lines = partition.topic in LINE_TOPICS
        self._share_bytes = share_bytes
        self._buffer: deque[Record] = deque()
        self.taken: Sequence[Record] = ()
        """For an insert; neither done nor given back."""
        self.taken_bytes = 0
        self.taken_lines = 0
        self._reading = False
        self._paused = True
        self._held = False
        self._next = 0
        """Lowest offset that is wanted: neither fetched nor known to be in the tables. At least `first`, since what is
        in the tables below `first` is not remembered."""
        self._gaps: list[OffsetRange] = []
        """Where none was among those that came, in the order of the log."""
        self._present: dict[int, int] = {}
        """Offsets from `first` on that are in the tables, and in which."""
        self._seen_ms = 0
        """Kafka's time of the newest record read."""

    @property
    def busy(self) -> bool:
        """Whether records are taken, and neither done nor given back."""
        return bool(self.taken)

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return self.settled and not self.taken and bool(self._buffer)

    @property
    def reading(self) -> bool:
        """Whether it was ever settled."""
        return self._reading

    @property
    def held(self) -> bool:
        return self._held

    @property
    def fetching(self) -> bool:
        """Whether Kafka is to be asked for more of it."""
        return self._reading and not self._paused and not self._held

    @property
    def next(self) -> int:
        """Lowest offset that is wanted."""
        return self._next

    @property
    def oldest(self) -> int:
        """Of those that are not in the tables, the first that was read, else the next one."""
        waiting = self.taken or self._buffer
        return waiting[0].offset if waiting else self._next

    def append(self, records: Sequence[Record]) -> None:
        """Takes records in the order of the log. Never waits: beyond its bounds the partition is not fetched from."""
        if not self._reading:
            return  # fetched before `seek`, which makes them come again
        if not self._buffer:
            self.waiting_since = time.monotonic()
        for record in records:
            if record.offset >= self._next:
                if record.offset > self._next:
                    self._gaps.append((self._next, record.offset - 1))
                self._next = record.offset + 1
                self._seen_ms = record.timestamp
                if not self._present or not self._is_there(record.offset):
                    self._buffer.append(record)
                    self._hold(size(record))
        if self._full() and not self._paused:
            self._paused = True
            self._consumer.pause(self.tp)

    def rewind(self) -> None:
        """What was fetched and not appended comes again. Raises IllegalStateError as `settle` does."""
        if self._reading:
            self._consumer.seek(self.tp, self._next)

    def hold(self) -> None:
        """Not to be fetched from, however empty it is, before `release`. Raises IllegalStateError as `settle` does."""
        self._held = True
        self._consumer.pause(self.tp)

    def release(self, at: int) -> None:
        """All below `at` was appended. Raises IllegalStateError as `settle` does."""
        self._held = False
        if self._reading and at > self._next:
            self._gaps.append((self._next, at - 1))
        self._next = max(self._next, at)
        self.rewind()
        if not self._paused:
            self._consumer.resume(self.tp)

    def settle(self, fence: str, begin: int, present: Mapping[int, int]) -> None:
        """What is known since the partition was fenced: everything below `begin` is done, and of the others `present`
        are in tables. Where they lack what was done, all from there on is read again. Raises IllegalStateError when it
        is not assigned any more."""
        self.fence = fence
        self._present = left = dict(present)
        first = begin
        while self._is_there(first):
            left.pop(first)
            first += 1
        if self._reading and first < self.first:
            self.forget()
        self._present, self.first = left, first
        self._next = max(self._next, self.first) if self._reading else self.first
        if not self._reading:
            self._consumer.seek(self.tp, self.first)
            self._reading = True
        self._drop_present()
        self.settled = True
        self._breathe()

    def forget(self) -> None:
        """What was read may be of another log than what comes: as if it was never settled. What is taken, stays
        until it is done or given back, and does not come back here then."""
        self.settled = self._reading = False
        self._budget.used -= self.bytes
        self._buffer.clear()
        self._present = {}
        self._gaps = self.gaps(self.taken[-1].offset) if self.taken else []
        self.bytes = self.first = self._next = 0
        if not self._paused:
            self._paused = True
            self._consumer.pause(self.tp)

    def take(self, room: Room, *, at_least_one: bool) -> Slice | None:
        """Records for an insert, as many as have room. None: not even one has."""
        used, lines, count = 0, 0, 0
        for record in self._buffer:
            used_then, lines_then = used + size(record), lines + self._lines(record)
            fits = count < room.records and used_then <= room.bytes and lines_then <= room.lines
            if not fits and not (at_least_one and count == 0):
                break
            used, lines, count = used_then, lines_then, count + 1
        if not count:
            return None
        self.taken = [self._buffer.popleft() for _ in range(count)]
        self.taken_bytes, self.taken_lines, self.taken_at = used, lines, time.monotonic()
        self.bytes -= used
        self._breathe()
        present = dict[int, int]()
        if self._present:
            present = {r.offset: self._present[r.offset] for r in self.taken if r.offset in self._present}
        return Slice(self.partition, self.taken, present, self.fence, self.mark)

    def done(self) -> tuple[int, int]:
        """What was taken is in the tables. Returns its first and last offset; behind the last everything that is
        there already counts, too."""
        first, last = self.taken[0].offset, self.taken[-1].offset
        while self._is_there(last + 1):
            last += 1
        self._present = {offset: tables for offset, tables in self._present.items() if offset > last}
        self.first = last + 1
        self._next = max(self._next, self.first)
        self._release()
        return first, last

    def gaps(self, before: int) -> list[OffsetRange]:
        """Ranges of offsets before this one at which no record came; each is said once."""
        found = [gap for gap in self._gaps if gap[1] < before]
        self._gaps = self._gaps[len(found) :]
        return found

    def give_back(self) -> None:
        """What was taken may be in the tables or not, or arrive there yet: until the partition is settled again. Where
        it was forgotten meanwhile, Kafka is asked for it anew."""
        self.settled = False
        if not self._reading:
            self._gaps = []
            self._release()
            return
        if not self._buffer:
            self.waiting_since = time.monotonic()
        self._buffer.extendleft(reversed(self.taken))
        self.bytes += self.taken_bytes
        self.taken, self.taken_bytes, self.taken_lines = (), 0, 0

    def close(self) -> None:
        """Holds nothing any more, and takes nothing: the partition is not ours."""
        self.closed, self._reading, self.settled = True, False, False
        self._release()
        self._budget.used -= self.bytes
        self._buffer.clear()
        self.bytes = 0

    def lag(self, end: int | None, now_ms: int) -> Lag:
        """`end`: one more than the last offset that may be read, where it is known. The seconds of a record of the
        future are infinite: its producer's clock is ahead, and says nothing."""
        waiting = self.taken or self._buffer
        unread = max(0, (end or 0) - self._next) if self._reading else 0
        records = len(self.taken) + len(self._buffer) + unread
        oldest_ms = waiting[0].timestamp if waiting else self._seen_ms
        # Offsets that only hold a transaction's marker are unread for ever; they come after everything seen.
        behind = bool(waiting) or (unread > 0 and self._paused)
        seconds = (now_ms - oldest_ms) / 1000
        return Lag(records, (seconds if seconds >= 0 else math.inf) if behind else 0.0)

    def _is_there(self, offset: int) -> bool:
        """Whether no table lacks anything of it."""
        tables = self._present.get(offset, 0)
        return bool(tables) and not missing(self.partition.topic, tables)

    def _drop_present(self) -> None:
        """Of the buffer, what turned out to be in the tables."""
        kept = [record for record in self._buffer if record.offset >= self.first and not self._is_there(record.offset)]
        kept_bytes = sum(map(size, kept))
        self._budget.used -= self.bytes - kept_bytes
        self._buffer, self.bytes = deque(kept), kept_bytes

    def _hold(self, size: int) -> None:
        self.bytes += size
        self._budget.used += size

    def _release(self) -> None:
        self._budget.used -= self.taken_bytes
        self.taken, self.taken_bytes, self.taken_lines = (), 0, 0

    def _full(self) -> bool:
        """A whole batch waits while another is inserted; or less, where all together hold more than they may."""
        return (
            len(self._buffer) >= 2 * self._batch_records
            or self.bytes >= max(BATCH_BYTES, self._share_bytes)
            or (self.bytes >= self._share_bytes and self._budget.used >= self._budget.bytes)
        )

    def _breathe(self) -> None:
        if self._paused and not self._full():
            self._paused = False
            if not self._held:
                self._consumer.resume(self.tp)

    def _lines(self, record: Record) -> int:
        # A line feed is a frequent byte of protobuf, and says nothing there.
        return line_feeds(record.value or b"") + 1 if self._has_lines else 1


def size(record: Record) -> int:
    """What it counts for in every bound of bytes."""
    # 64: the columns beside key and value.
    return len(record.value or b"") + len(record.key or b"") + 64

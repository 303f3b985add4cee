"""Offsets at which no record came: whether Kafka has none there, or one was lost on the way.

A committed reader gets none at markers that end transactions, at records of aborted ones, and where records were
compacted away. A reader that skipped them cannot be told from one that lost a record: so Kafka is asked once more what
lies there, by a connection of its own, and what it says goes into the log of inserts (step 2).

Promises: an offset is said to be skipped only when an answer of Kafka's, read as a committed reader does, passes it
without a record. What could not be asked in time goes into the log of inserts, too, as `unasked`, and is asked again
until Kafka answers, by whoever has the partition then. What lies beyond the beginning of the log by then, or cannot be
read, is never known, and stays a gap. Bounds: ASK_SECONDS; the newest MANY ranges of a partition: it says so where more
would wait. Knows nothing of ClickHouse.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from fulgurite.consumers.materialiser.blocks import OffsetRange, Partition
from fulgurite.consumers.materialiser.store import LogEntry
from fulgurite.producers.raw import Read

logger = logging.getLogger(__name__)

ASK_SECONDS: Final = 2.0
"""Longest that the log of inserts waits for it."""
MANY: Final = 10_000


Newest = Callable[[Collection[Partition]], Awaitable[Mapping[Partition, LogEntry]]]
"""Of the partitions that the log of inserts knows, its newest entries, with what they leave to be asked."""


class Skipped:
    """Of the partitions of one consumer; `forget` one that is not ours any more, or may have another log."""

    def __init__(self, read: Callable[[TopicPartition, int], Awaitable[Read]], newest: Newest) -> None:
        """`read` is History.read."""
        self._read = read
        self._newest = newest
        self._last: dict[TopicPartition, LogEntry | None] = {}
        """Of partitions whose gaps of before are known: the newest entry, where there is one."""
        self._gaps: dict[TopicPartition, deque[OffsetRange]] = {}
        """In the order of the log, not asked yet."""

    def forget(self, tp: TopicPartition | None = None) -> None:
        """What the log of inserts knows as well. All, where it is not said which."""
        for known in (self._last, self._gaps):
            if tp is None:
                known.clear()
            else:
                known.pop(tp, None)

    def asked(self, tp: TopicPartition) -> bool:
        """Whether nothing is left to be asked, as far as is known."""
        return tp in self._last and not self._gaps.get(tp)

    async def known(
        self, entries: Sequence[LogEntry], ours: Collection[Partition] = ()
    ) -> tuple[list[LogEntry], list[LogEntry]]:
        """The same; the last of each partition says what is known of all gaps before its end. And of those of `ours`
        that have none, the newest entry once more where something became known since. Raises what `newest` raises."""
        ours_too = {_tp(partition): partition for partition in ours}
        await self._learn(ours_too | {_tp(entry.partition): entry.partition for entry in entries})
        last: dict[TopicPartition, int] = {}
        for number, entry in enumerate(entries):
            tp = _tp(entry.partition)
            last[tp] = number
            self._last[tp] = replace(entry, gaps=())
            self._wait(tp, entry.gaps)
        waiting = {tp: gaps for tp in {**last, **ours_too} if (gaps := self._gaps.get(tp))}
        before = {tp: list(gaps) for tp, gaps in waiting.items()}
        asked = {tp: list[OffsetRange]() for tp in waiting}
        try:
            async with asyncio.timeout(ASK_SECONDS):
                for tp, found in asked.items():
                    try:
                        await self._ask(tp, waiting[tp], found)
                    except KafkaError as error:  # others may have leaders that answer
                        logger.debug("%s-%d: what lies where no record came is asked again later: %r", *tp, error)
        except TimeoutError:
            logger.debug("what lies where no record came is asked again later: Kafka takes too long")
        said, later = list(entries), list[LogEntry]()
        for tp, found in asked.items():
            left = list(waiting[tp])
            if tp in last:
                said[last[tp]] = replace(said[last[tp]], skipped=found, unasked=left)
            elif left != before[tp] and (newest := self._last.get(tp)) is not None:
                later.append(replace(newest, records=0, skipped=found, unasked=left))
        return said, later

    async def _learn(self, partitions: Mapping[TopicPartition, Partition]) -> None:
        """Returns when it is known of all what is left to be asked: one may be forgotten meanwhile."""
        while lacking := [partition for tp, partition in partitions.items() if tp not in self._last]:
            name = lacking[0].name
            some = [partition for partition in lacking if partition.name == name]
            newest = await self._newest(some)
            for partition in some:
                entry = newest.get(partition)
                self._last[_tp(partition)] = entry
                if entry is not None:
                    self._wait(_tp(partition), entry.unasked)

    def _wait(self, tp: TopicPartition, gaps: Sequence[OffsetRange]) -> None:
        if not gaps:
            return
        waiting = self._gaps.setdefault(tp, deque())
        waiting.extend(gaps)
        if len(waiting) > MANY:
            what = "%s-%d: more than %d ranges without a record wait for Kafka to say what lies there: those before "
            what += "offset %d are never asked, and stay gaps"
            while len(waiting) > MANY:
                waiting.popleft()
            logger.warning(what, *tp, MANY, waiting[0][0], extra=_place(tp, waiting[0][0]))

    async def _ask(self, tp: TopicPartition, gaps: deque[OffsetRange], found: list[OffsetRange]) -> None:
        """Moves from `gaps` to `found` what has no record. Raises KafkaError: try again."""
        while gaps:
            at = gaps[0][0]
            try:
                read = await self._read(tp, at)
            except KafkaError as error:
                if error.retriable:
                    raise
                unknown: object = error
            except Exception as error:  # decoders raise errors of many kinds
                unknown = error
            else:
                unknown = None if read.next > at else "nothing is there"
                offsets = [record.offset for record in read.records]
                while gaps and gaps[0][0] < read.next:
                    lo, hi = gaps.popleft()
                    if hi >= read.next:
                        gaps.appendleft((read.next, hi))
                    end = min(hi + 1, read.next)
                    lost = offsets[bisect_left(offsets, lo) : bisect_left(offsets, end)]
                    found += _between(lo, end, lost)
                    if lost:
                        what = "%s-%d: %d records from offset %d on were not given by Kafka's client"
                        logger.error(what, *tp, len(lost), lost[0], extra=_place(tp, lost[0]))
                    if hi >= read.next:
                        break
            if unknown is not None:
                logger.warning(
                    "%s-%d: what lies at offset %d cannot be known: %s", *tp, at, unknown, extra=_place(tp, at)
                )
                gaps.popleft()


def _tp(partition: Partition) -> TopicPartition:
    return TopicPartition(partition.name, partition.number)


def _between(lo: int, end: int, lost: Sequence[int]) -> Iterator[OffsetRange]:
    """What is left of lo..end, the latter excluded, without these offsets."""
    for offset in [*lost, end]:
        if lo < offset:
            yield lo, offset - 1
        lo = offset + 1


def _place(tp: TopicPartition, offset: int) -> dict[str, str | int]:
    return {"topic": tp.topic, "partition": tp.partition, "offset": offset}

"""Offsets at which no record came: whether Kafka has none there, or one was lost on the way.

A committed reader gets none at markers that end transactions, at records of aborted ones, and where records were
compacted away. A reader that skipped them cannot be told from one that lost a record: so Kafka is asked once more what
lies there, by a connection of its own, and what it says goes into the log of inserts (step 2).

Promises: an offset is said to be skipped only when an answer of Kafka's, read as a committed reader does, passes it
without a record. What could not be asked in time is asked again with the partition's next range. What lies beyond the
beginning of the log by then, or cannot be read, is never known, and stays a gap. Bounds: ASK_SECONDS; the newest MANY
ranges of a partition. Knows nothing of ClickHouse.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from fulgurite.consumers.materialiser.blocks import OffsetRange
from fulgurite.consumers.materialiser.store import LogEntry
from fulgurite.producers.raw import Read

logger = logging.getLogger(__name__)

ASK_SECONDS: Final = 2.0
"""Longest that the log of inserts waits for it."""
MANY: Final = 10_000


class Skipped:
    """Of the partitions of one consumer; `forget` one that is not ours any more, or has another log."""

    def __init__(self, read: Callable[[TopicPartition, int], Awaitable[Read]]) -> None:
        """`read` is History.read."""
        self._read = read
        self._gaps: dict[TopicPartition, deque[OffsetRange]] = {}
        """In the order of the log, not asked yet."""

    def forget(self, tp: TopicPartition | None = None) -> None:
        """All, where it is not said which."""
        if tp is None:
            self._gaps.clear()
        else:
            self._gaps.pop(tp, None)

    def asked(self, tp: TopicPartition) -> bool:
        """Whether nothing is left to be asked."""
        return not self._gaps.get(tp)

    async def known(self, entries: Sequence[LogEntry]) -> list[LogEntry]:
        """The same; the last of each partition says what is known of all gaps before its end."""
        last: dict[TopicPartition, int] = {}
        for number, entry in enumerate(entries):
            tp = TopicPartition(entry.partition.name, entry.partition.number)
            last[tp] = number
            if entry.gaps:
                self._gaps.setdefault(tp, deque(maxlen=MANY)).extend(entry.gaps)
        asked = {tp: list[OffsetRange]() for tp in last if self._gaps.get(tp)}
        try:
            async with asyncio.timeout(ASK_SECONDS):
                for tp, found in asked.items():
                    await self._ask(tp, self._gaps[tp], found)
        except (KafkaError, TimeoutError) as error:
            logger.debug("what lies where no record came is asked again later: %r", error)
        said = list(entries)
        for tp, found in asked.items():
            said[last[tp]] = replace(said[last[tp]], skipped=found)
        return said

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


def _between(lo: int, end: int, lost: Sequence[int]) -> Iterator[OffsetRange]:
    """What is left of lo..end, the latter excluded, without these offsets."""
    for offset in [*lost, end]:
        if lo < offset:
            yield lo, offset - 1
        lo = offset + 1


def _place(tp: TopicPartition, offset: int) -> dict[str, str | int]:
    return {"topic": tp.topic, "partition": tp.partition, "offset": offset}

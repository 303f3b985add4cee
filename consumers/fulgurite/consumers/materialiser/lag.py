"""How far the tables are behind Kafka, and whether Kafka still answers: measured by a task of its own, so that a store
that hangs hides nothing.

    lag        ends of the partitions, minus what is in the tables. Of a partition that is not settled yet: minus what
               was last known to be, by this process or by what the group committed (a hint, and at most too little)
    age        of the oldest record that waits: since its Kafka time, which producers may set as they like, but no
               longer than since its offset was first seen to be there. What was there before this process came has
               only the former
    silence    a partition that is to be fetched from, and of which no fetch was answered for SILENT_SECONDS

Promises: each is measured every MEASURE_SECONDS, and ASK_SECONDS later where Kafka does not say; lag is then by the
ends that were last known.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from fulgurite.consumers.materialiser.metrics import Lag, Metrics
from fulgurite.consumers.materialiser.partition import PartitionBuffer

MEASURE_SECONDS: Final = 1.0
ASK_SECONDS: Final = 3.0
"""An answer may wait for that of a fetch, half a second."""
SEEN: Final = 3_600
"""So many ends of a partition are remembered: an hour."""
EVER_MS: Final = -(10**15)
"""Before all times of records."""
SILENT_SECONDS: Final = 10.0
"""A broker answers a fetch at least every half second, whether it has records or not."""


class Asked(Protocol):
    """What is needed of aiokafka's consumer."""

    def assignment(self) -> set[TopicPartition]: ...
    def last_poll_timestamp(self, partition: TopicPartition) -> int | None: ...
    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...
    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...
    async def committed(self, partition: TopicPartition) -> int | None: ...


class LagMeter:
    """Run it with `run`, cancel that to stop."""

    def __init__(
        self,
        buffers: Mapping[TopicPartition, PartitionBuffer],
        metrics: Metrics,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """`buffers` are those of the moment."""
        self._buffers = buffers
        self._metrics = metrics
        self._now_ms = now_ms
        self._began_ms = now_ms()
        self._ends: dict[TopicPartition, int] = {}
        self._seen: dict[TopicPartition, deque[tuple[int, int]]] = {}
        """When, in ms, and which end was seen, each greater than the one before; of those behind the first one."""
        self._done: dict[TopicPartition, int] = {}
        """All below is in the tables, as far as is known."""
        self._behind_ms: dict[TopicPartition, int] = {}
        """Since when something of it has waited; survives that the partition is assigned anew."""
        self._fetched_since_ms: dict[TopicPartition, int] = {}

    async def run(self, consumer: Asked) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(MEASURE_SECONDS)
            with contextlib.suppress(KafkaError, IllegalStateError, TimeoutError):
                async with asyncio.timeout(ASK_SECONDS):
                    await self.ask(consumer)
            self.measure(consumer)

    async def ask(self, consumer: Asked) -> None:
        """Kafka. Raises KafkaError; IllegalStateError where a partition is not ours any more."""
        tps = list(self._buffers)
        if not tps:
            return
        self._ends |= await consumer.end_offsets(tps)
        for tp in tps:
            seen = self._seen.setdefault(tp, deque(maxlen=SEEN))
            if not seen or self._ends[tp] > seen[-1][1]:
                seen.append((self._now_ms() if seen else EVER_MS, self._ends[tp]))
        new = [tp for tp, buffer in self._buffers.items() if not buffer.reading and tp not in self._done]
        if new:
            begins = await consumer.beginning_offsets(new)
            for tp in new:
                self._done[tp] = await consumer.committed(tp) or begins[tp]

    def measure(self, consumer: Asked) -> None:
        """By what is known."""
        now_ms, ours = self._now_ms(), consumer.assignment()
        for tp, buffer in self._buffers.items():
            if buffer.closed:
                continue
            if buffer.reading:
                self._done[tp] = buffer.first
            self._metrics.lag(tp.topic, tp.partition, self._lag(tp, buffer, now_ms))
            if tp in ours:
                self._silence(tp, buffer, consumer.last_poll_timestamp(tp), now_ms)

    def _lag(self, tp: TopicPartition, buffer: PartitionBuffer, now_ms: int) -> Lag:
        end = self._ends.get(tp, 0)
        if buffer.reading:
            lag = buffer.lag(end, now_ms)
            # A time of the future is no bound; then what was there before we came counts since we came.
            bound = lag.seconds if math.isfinite(lag.seconds) else (now_ms - self._began_ms) / 1000
            lag = Lag(lag.records, min(bound, self._seen_seconds(tp, buffer.oldest, now_ms)))
            stands = buffer.held and lag.records > 0
        else:
            lag = Lag(max(0, end - self._done.get(tp, end)), 0.0)
            stands = lag.records > 0
        if lag.seconds or not stands:
            self._behind_ms[tp] = now_ms - int(lag.seconds * 1000)
            return lag
        return Lag(lag.records, (now_ms - self._behind_ms.setdefault(tp, now_ms)) / 1000)

    def _seen_seconds(self, tp: TopicPartition, offset: int, now_ms: int) -> float:
        """Since when the offset is known to be there; since ever where it was when we came."""
        since = next((at for at, end in self._seen.get(tp, ()) if end > offset), now_ms)
        return (now_ms - since) / 1000

    def _silence(self, tp: TopicPartition, buffer: PartitionBuffer, answered_ms: int | None, now_ms: int) -> None:
        if not buffer.fetching:
            self._fetched_since_ms.pop(tp, None)
            self._metrics.heard(tp.topic, tp.partition)
            return
        since_ms = max(answered_ms or 0, self._fetched_since_ms.setdefault(tp, now_ms))
        if now_ms - since_ms > SILENT_SECONDS * 1000:
            why = f"no fetch was answered for {(now_ms - since_ms) // 1000} s"
            self._metrics.silent(tp.topic, tp.partition, why)
        else:
            self._metrics.heard(tp.topic, tp.partition)

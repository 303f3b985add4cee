"""Looks every second whether the logs that are read are still those that were settled: their topics' ids, their
leaders' epochs, and that their ends do not lie before what was read. One that is not is to be settled again, from its
tables. A topic that is not there makes the service not ready: nobody has its partitions then, and nothing else would
say so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Final, Protocol

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from fulgurite.consumers.materialiser.history import Incarnation
from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.partition import PartitionBuffer

WATCH_SECONDS: Final = 1.0


class Ends(Protocol):
    """What is needed of aiokafka's consumer."""

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]: ...


class Incarnations(Protocol):
    """What is needed of History."""

    async def incarnations(self, topics: Collection[str]) -> dict[TopicPartition, Incarnation]: ...


class Watch:
    """Run it with `run`, cancel that to stop."""

    def __init__(
        self,
        topics: Collection[str],
        buffers: Mapping[TopicPartition, PartitionBuffer],
        history: Incarnations,
        doubt: Callable[[TopicPartition, str], None],
        metrics: Metrics,
    ) -> None:
        """`buffers` are those of the moment; `doubt` is told why a partition is to be settled again."""
        self._topics = topics
        self._buffers = buffers
        self._history = history
        self._doubt = doubt
        self._metrics = metrics

    async def run(self, consumer: Ends) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            # Whether Kafka answers at all, lag.py says.
            with contextlib.suppress(KafkaError, IllegalStateError, TimeoutError):
                await self.look(consumer)

    async def look(self, consumer: Ends) -> None:
        """Raises KafkaError or TimeoutError; IllegalStateError where a partition is not ours any more."""
        found = await self._history.incarnations(self._topics)
        self._metrics.lacking_topics(set(self._topics) - {tp.topic for tp in found})
        for tp, buffer in list(self._buffers.items()):
            settled = buffer.incarnation
            now = found.get(tp)
            if buffer.reading and settled is not None and now is not None:
                if now.topic_id != settled.topic_id:
                    self._doubt(tp, "the topic was made anew")
                elif now.epoch != settled.epoch:
                    self._doubt(tp, f"its leader's epoch is {now.epoch}, and was {settled.epoch}")
        read = {tp: buffer.next for tp, buffer in self._buffers.items() if buffer.reading and tp in found}
        if not read:
            return
        async with asyncio.timeout(5):
            ends = await consumer.end_offsets(list(read))
        for tp, at in read.items():
            buffer = self._buffers.get(tp)
            if buffer is not None and buffer.reading and ends[tp] < at:
                self._doubt(tp, f"its log ends at offset {ends[tp]}, and was read up to {at - 1}")

"""What the materialiser says to its consumer group: commits, which are hints for lag monitors, and which Kafka refuses
from a consumer that is no longer of the group. Knows nothing of ClickHouse.
"""

from __future__ import annotations

import logging
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

logger = logging.getLogger(__name__)


class Lost(Exception):
    """The partitions are not ours any more."""


class Committing(Protocol):
    """What is needed of aiokafka's consumer."""

    def assignment(self) -> set[TopicPartition]: ...
    async def commit(self, offsets: dict[TopicPartition, int]) -> None: ...


class Offsets:
    """One for each consumer."""

    def __init__(self, consumer: Committing) -> None:
        self._consumer = consumer

    async def claim(self, offsets: dict[TopicPartition, int]) -> None:
        """Returns when the group has taken these offsets from us, each the first that is not done. Raises Lost when we
        are not of the group, or not with these partitions; KafkaError: try again."""
        if not offsets.keys() <= self._consumer.assignment():
            raise Lost
        try:
            await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError) as error:
            # The generation moved on: every partition is revoked or about to be, and assigned anew.
            raise Lost from error

    async def finish(self, offsets: dict[TopicPartition, int]) -> None:
        """Commits, for each partition, the offset to go on with. Failures are left to the next one."""
        ours = self._consumer.assignment()
        known = {partition: offset for partition, offset in offsets.items() if partition in ours}
        if known:
            try:
                await self._consumer.commit(known)
            except (KafkaError, IllegalStateError) as error:
                logger.debug("commit left to the next one: %r", error)

"""What the materialiser writes to and reads from its consumer group: intents and commits.

An intent is a committed offset lo whose metadata is hi: "I am about to insert lo..hi". Promises: `intend` returns only
when the group has taken it, and raises Lost when the partition is no longer ours; requests of many partitions that come
together travel as one. Knows nothing of ClickHouse.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from fulgurite.consumers.committed import committed

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5


class Lost(Exception):
    """The partition is not ours any more."""


@dataclass(frozen=True, slots=True)
class Intent:
    """A range somebody was about to insert, both ends included."""

    lo: int
    hi: int


class Offsets:
    """One for each consumer. `run` must be running for `intend` to return."""

    def __init__(self, consumer: AIOKafkaConsumer, admin: AIOKafkaAdminClient, group: str) -> None:
        self._consumer = consumer
        self._admin = admin
        self._group = group
        self._waiting: dict[TopicPartition, tuple[OffsetAndMetadata, asyncio.Future[None]]] = {}
        self._intended: dict[TopicPartition, int] = {}
        """Where the last intent of each partition begins, whether it was taken yet or not."""
        self._work = asyncio.Event()
        self._sending = asyncio.Lock()

    async def intent(self, partition: TopicPartition) -> Intent | None:
        """What was last intended for the partition; None where everything before the committed offset is done."""
        while True:
            try:
                found = await committed(self._admin, self._group, [partition])
                break
            except KafkaError as error:
                logger.warning("cannot read the group's offsets, trying again: %r", error)
                await asyncio.sleep(RETRY_SECONDS)
        at = found.get(partition)
        if at is None or not at.metadata.isdecimal():
            return None
        return Intent(at.offset, int(at.metadata))

    async def intend(self, partition: TopicPartition, intent: Intent) -> None:
        """Returns when the group knows the intent. Raises Lost."""
        await self._request(partition, OffsetAndMetadata(intent.lo, str(intent.hi)))

    async def finish(self, done: dict[TopicPartition, int]) -> None:
        """Commits, for each partition, the offset to go on with. A hint: failures are left to the next one.

        Never over a later intent: its insert may run, and who resumes must know of it.
        """
        async with self._sending:  # no intent is sent meanwhile, which this could overtake
            ours = self._consumer.assignment()
            offsets = {
                tp: OffsetAndMetadata(offset, "")
                for tp, offset in done.items()
                if tp in ours and self._intended.get(tp, -1) < offset
            }
            if offsets:
                try:
                    await self._consumer.commit(offsets)
                except (KafkaError, IllegalStateError) as error:
                    logger.debug("commit left to the next one: %r", error)

    async def settle(self) -> None:
        """Returns when no request is on its way: before partitions are given up, so that none overtakes a
        successor's."""
        async with self._sending:
            pass

    async def run(self) -> None:
        """Sends what is asked for, until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            async with self._sending:
                requests, self._waiting = self._waiting, {}
                if requests:
                    await self._send(requests)

    async def _request(self, partition: TopicPartition, value: OffsetAndMetadata) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        assert partition not in self._waiting, "one batch of a partition at a time"
        self._waiting[partition] = (value, answer)
        self._intended[partition] = value.offset
        self._work.set()
        await answer

    async def _send(self, requests: dict[TopicPartition, tuple[OffsetAndMetadata, asyncio.Future[None]]]) -> None:
        ours = self._consumer.assignment()
        for partition in requests.keys() - ours:
            _fail(requests[partition][1])
        open_requests = {tp: request for tp, request in requests.items() if tp in ours}
        if not open_requests:
            return
        try:
            await self._consumer.commit({tp: value for tp, (value, _) in open_requests.items()})
        except (CommitFailedError, IllegalStateError):
            # The generation moved on: every partition is revoked or about to be, and assigned anew.
            for _, answer in open_requests.values():
                _fail(answer)
        except KafkaError as error:
            logger.warning("the group did not take the intents, trying again: %r", error)
            await asyncio.sleep(RETRY_SECONDS)
            self._waiting = {**open_requests, **self._waiting}
            self._work.set()
        else:
            for _, answer in open_requests.values():
                if not answer.done():
                    answer.set_result(None)


def _fail(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_exception(Lost())

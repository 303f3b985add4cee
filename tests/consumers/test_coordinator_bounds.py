"""The coordinator without a broker: records that do not fit through, letters that were refused, offsets not loaded."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from aiokafka.errors import GroupLoadInProgressError, MessageSizeTooLargeError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.consumers.committed import committed
from fulgurite.consumers.coordinator.log import Entry
from fulgurite.consumers.coordinator.service import Coordinator
from fulgurite.consumers.coordinator.term import Term
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.rollouts import ROLLOUT_EVENT
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import ROLLOUTS, Topic

BOUND = 1_024


class FakePublisher:
    def __init__(self) -> None:
        self.sent: list[tuple[Topic, bytes | None, bytes | None]] = []

    async def publish_bytes(self, topic: Topic, key: bytes | None, value: bytes | None) -> asyncio.Future[None]:
        self.sent.append((topic, key, value))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def misrouted(value: bytes) -> Entry:
    event = decode_union(ROLLOUT_EVENT, "RolloutEvent", value)
    return Entry(partition=0, offset=5, event=event, misrouted=True, key=b"other", value=value)


def queued(size: int) -> bytes:
    """A record of this size that is larger when it is written again, with all its defaults."""
    empty = b'{"event":"queued","rollout_id":"r1","input":""}'
    return empty[:-2] + b"x" * (size - len(empty)) + empty[-2:]


async def test_a_misrouted_record_is_forwarded_as_it_is() -> None:
    coordinator = Coordinator(Settings(kafka=KafkaSettings(max_record_bytes=BOUND)))
    publisher = FakePublisher()
    coordinator._publisher = cast(Any, publisher)
    value = queued(BOUND - 2)
    assert await coordinator._forward(misrouted(value)) == []
    assert publisher.sent == [(ROLLOUTS, b"r1", value)]


async def test_a_misrouted_record_that_does_not_fit_becomes_a_dead_letter() -> None:
    coordinator = Coordinator(Settings(kafka=KafkaSettings(max_record_bytes=BOUND)))
    value = queued(BOUND)  # and no room for the key
    [letter] = await coordinator._forward(misrouted(value))
    assert (letter.reason, letter.partition, letter.offset, letter.value) == ("too_large", 0, 5, value)


class RefusingProducer:
    """Takes records, and learns afterwards that the broker does not."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def begin_transaction(self) -> None:
        self.calls.append("begin")

    async def send(self, topic: str, value: object, key: object, headers: object) -> asyncio.Future[None]:
        refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.01, refused.set_exception, MessageSizeTooLargeError())
        return refused

    async def send_offsets_to_transaction(self, offsets: object, group: str) -> None:
        self.calls.append("offsets")

    async def commit_transaction(self) -> None:
        self.calls.append("commit")


async def test_a_refused_dead_letter_is_not_counted_as_handled() -> None:
    term, producer = Term(KafkaSettings()), RefusingProducer()
    term._producer = cast(Any, producer)
    letter = DeadLetter("rollouts", 0, 1, "coordinator", "not_json", "why", b"r1", b"{")
    with pytest.raises(MessageSizeTooLargeError):
        await term.renew([letter, letter], {0: 2})
    assert producer.calls == ["begin"]
    assert not term.is_confirmed


class Admin:
    def __init__(self, answer: dict[TopicPartition, OffsetAndMetadata]) -> None:
        self.answer = answer

    async def list_consumer_group_offsets(
        self, group_id: str, group_coordinator_id: int | None = None, partitions: list[TopicPartition] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        return self.answer


async def test_an_answer_without_all_partitions_is_no_answer() -> None:
    first, second = TopicPartition("rollouts", 0), TopicPartition("rollouts", 1)
    with pytest.raises(GroupLoadInProgressError):
        await committed(Admin({}), "group", [first, second])
    at = OffsetAndMetadata(7, "")
    whole = Admin({first: at, second: OffsetAndMetadata(-1, "")})
    assert await committed(whole, "group", [first, second]) == {first: at}

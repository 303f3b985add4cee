"""Transactions against a broker that goes away, against a rival, and against lost answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import IllegalOperation, KafkaConnectionError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.schemas import topics
from fulgurite.schemas.errors import Fenced
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.streams.transactions import Outgoing, Transactions
from tests.streams.assembler_bus import Bus, Mortal, connected

INPUT = TopicPartition("input", 0)


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(tmp_path / "kafka") as server:
        yield server


def outgoing(settings: KafkaSettings, text: str) -> list[Outgoing]:
    return [Outgoing(settings.topic(topics.TRAJECTORIES), b"key", text.encode())]


async def texts(bus: Bus) -> list[str]:
    return [(record.value or b"").decode() for record in await bus.read(topics.TRAJECTORIES)]


def at(offset: int, metadata: str = "") -> dict[TopicPartition, OffsetAndMetadata]:
    return {INPUT: OffsetAndMetadata(offset, metadata)}


async def started(settings: KafkaSettings, **options: object) -> Transactions:
    transactions = Transactions(settings, f"{settings.topic_prefix}t", f"{settings.topic_prefix}g", **options)  # type: ignore[arg-type]
    await transactions.start()
    return transactions


@pytest.fixture
async def input_topic(kafka_settings: KafkaSettings) -> None:
    await _create(kafka_settings.bootstrap_servers, INPUT.topic)


async def _create(servers: str, *names: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(name, 1, 1) for name in names])
    await admin.close()


async def test_records_and_offsets_become_visible_together(kafka_settings: KafkaSettings, input_topic: None) -> None:
    transactions = await started(kafka_settings)
    assert await transactions.committed([INPUT]) == {INPUT: None}
    await transactions.commit(outgoing(kafka_settings, "a"), at(3, '{"note": 1}'))
    await transactions.start()
    assert await transactions.committed([INPUT]) == at(3, '{"note": 1}')
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == ["a"]
    await transactions.close()


async def test_offsets_are_final_when_a_successor_has_started(kafka_settings: KafkaSettings, input_topic: None) -> None:
    """They are written an instant after the commit is acknowledged; a start must wait for that."""
    for number in range(1, 21):
        transactions = await started(kafka_settings)
        assert await transactions.committed([INPUT]) == (at(number - 1) if number > 1 else {INPUT: None})
        await transactions.commit(outgoing(kafka_settings, f"{number}"), at(number))
        await transactions.close()


async def test_a_rival_fences_and_nothing_of_the_loser_is_seen(
    kafka_settings: KafkaSettings, input_topic: None
) -> None:
    first = await started(kafka_settings)
    await first.committed([INPUT])
    await first.commit(outgoing(kafka_settings, "a"), at(1))
    second = await started(kafka_settings)
    assert await second.committed([INPUT]) == at(1)
    with pytest.raises(Fenced):
        await first.commit(outgoing(kafka_settings, "lost"), at(2))
    await second.commit(outgoing(kafka_settings, "b"), at(2))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == ["a", "b"]
    await first.close()
    await second.close()


async def test_a_rival_that_the_background_sender_meets_first_fences_too(
    kafka_settings: KafkaSettings, input_topic: None
) -> None:
    """aiokafka then calls the next record illegal, as it does a record outside of a transaction: that stays an error of
    whoever sends it."""
    first = await started(kafka_settings)
    await first.claim([INPUT])
    producer: Any = first._producer  # pyright: ignore[reportPrivateUsage]
    send, begin = producer.send, producer.begin_transaction

    async def send_slowly(*arguments: Any, **options: Any) -> Any:
        sent = await send(*arguments, **options)
        await asyncio.sleep(0.2)
        return sent

    async def forget_to_begin() -> None: ...

    producer.begin_transaction = forget_to_begin
    with pytest.raises(IllegalOperation, match="not in transaction"):
        await first.commit(outgoing(kafka_settings, "too early"), at(2))
    producer.begin_transaction, producer.send = begin, send_slowly
    second = await started(kafka_settings)
    with pytest.raises(Fenced, match="another process uses the transactional id"):
        await first.commit(2 * outgoing(kafka_settings, "lost"), at(2))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == []
    for each in (first, second):
        await each.close()


@pytest.mark.parametrize("step", ["begun", "sent", "committed"])
async def test_an_error_at_any_step_is_resolved_by_the_offsets(
    kafka_settings: KafkaSettings, input_topic: None, step: str
) -> None:
    """`committed` is the lost answer: the broker has the transaction, the client an error."""
    failures = [step]

    def hook(reached: str) -> None:
        if failures and reached == failures[0]:
            failures.pop()
            raise KafkaConnectionError("the answer was lost")

    transactions = await started(kafka_settings, hook=hook)
    await transactions.committed([INPUT])
    await transactions.commit(outgoing(kafka_settings, "once"), at(1))
    await transactions.commit(outgoing(kafka_settings, "then"), at(2))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == ["once", "then"]
    await transactions.close()


async def test_an_error_right_behind_a_commit_is_not_taken_for_an_heir(
    kafka_settings: KafkaSettings, input_topic: None
) -> None:
    """The offsets do not carry the last commit's stamp yet, but the one before."""
    due = False

    def hook(reached: str) -> None:
        nonlocal due
        if due and reached == "begun":
            due = False
            raise KafkaConnectionError("the broker was away")

    transactions = await started(kafka_settings, hook=hook)
    await transactions.claim([INPUT])
    for number in range(1, 21):
        await transactions.commit(outgoing(kafka_settings, f"{number}"), at(number))
        due = True
        await transactions.commit(outgoing(kafka_settings, f"{number} again"), at(number))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == [text for number in range(1, 21) for text in (f"{number}", f"{number} again")]
    await transactions.close()


async def test_offsets_moved_by_somebody_else_are_noticed(kafka_settings: KafkaSettings, input_topic: None) -> None:
    """A rival committed and left again while our answer was lost: its work must not be repeated."""
    rivals: list[Transactions] = []

    def hook(reached: str) -> None:
        if reached == "begun" and not rivals:
            raise KafkaConnectionError("the answer was lost")

    transactions = await started(kafka_settings, hook=hook)
    await transactions.committed([INPUT])
    restart = transactions.start

    async def rival_first() -> None:
        rival = await started(kafka_settings)
        rivals.append(rival)
        await rival.committed([INPUT])
        await rival.commit(outgoing(kafka_settings, "rival"), at(1))
        await rival.close()
        await restart()

    transactions.start = rival_first  # type: ignore[method-assign]
    with pytest.raises(Fenced, match="another process committed"):
        await transactions.commit(outgoing(kafka_settings, "ours"), at(1))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == ["rival"]
    await transactions.close()


async def test_a_predecessor_that_wakes_up_neither_commits_nor_fences_who_claimed(
    kafka_settings: KafkaSettings, input_topic: None
) -> None:
    """It was cut off in the middle of a commit, and its successor has committed nothing of its own yet."""
    asleep, woken = asyncio.Event(), asyncio.Event()

    async def sleep() -> None:
        asleep.set()
        await woken.wait()
        raise KafkaConnectionError("the network was away")

    predecessor = await started(kafka_settings)
    await predecessor.claim([INPUT])
    await predecessor.commit(outgoing(kafka_settings, "first"), at(1, "marker"))
    producer = predecessor._producer  # pyright: ignore[reportPrivateUsage]
    producer.begin_transaction = sleep  # type: ignore[union-attr,method-assign]
    commit = asyncio.create_task(predecessor.commit(outgoing(kafka_settings, "zombie"), at(2)))
    await asleep.wait()
    heir = await started(kafka_settings)
    before = await heir.claim([INPUT])
    assert before == at(1, "marker"), "what it claims stays as it is"
    woken.set()
    with pytest.raises(Fenced, match="another process committed"):
        await commit
    with pytest.raises(Fenced, match="another process committed"):
        await predecessor.confirm()
    await heir.confirm()
    await heir.start()
    assert await heir.committed([INPUT]) == before, "and so does what it confirms"
    assert heir.lineage == predecessor.lineage
    await heir.commit(outgoing(kafka_settings, "heir"), at(3))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == ["first", "heir"]
    for each in (predecessor, heir):
        await each.close()


@pytest.mark.slow
async def test_a_transaction_that_timed_out_is_written_again(
    kafka_settings: KafkaSettings, input_topic: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that was stopped for a while: the broker has aborted its transaction, and calls it fenced."""
    pauses = [13.0]

    def hook(reached: str) -> None:
        if reached == "sent" and pauses:
            time.sleep(pauses.pop())  # the whole process stands still; the broker looks every ten seconds

    transactions = await started(kafka_settings, hook=hook, timeout_ms=1_000)
    await transactions.committed([INPUT])
    await transactions.commit(outgoing(kafka_settings, "late"), at(1))
    async with connected(kafka_settings) as bus:
        assert await texts(bus) == ["late"]
    assert "asking the broker how it ended" in caplog.text
    await transactions.close()


@pytest.mark.chaos
@pytest.mark.slow
async def test_the_broker_is_killed_in_the_middle_of_a_transaction(own_kafka: EmbeddedKafka) -> None:
    settings = KafkaSettings(bootstrap_servers=own_kafka.bootstrap_servers, topic_prefix="", partitions=1)
    await _create(settings.bootstrap_servers, INPUT.topic, topics.TRAJECTORIES.name)
    mortal = Mortal(own_kafka, {"begun": 1, "sent": 1})
    transactions = await started(settings, hook=mortal.hook)
    await transactions.committed([INPUT])
    reviving = asyncio.create_task(mortal.revive())
    number = 0
    while any(mortal.kills.values()) or number < 3:
        number += 1
        await transactions.commit(outgoing(settings, f"t{number}"), at(number))
        await asyncio.sleep(0.1)
    reviving.cancel()
    async with connected(settings) as bus:
        assert await texts(bus) == [f"t{n}" for n in range(1, number + 1)]
    await transactions.close()

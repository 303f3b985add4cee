"""Partitions that are added while an algorithm reads: from their beginning, exactly once, and no group closes early."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode, encode
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms import algorithm
from fulgurite.streams.algorithms.commits import Commits
from fulgurite.streams.algorithms.prompts.publishing import Publishing
from fulgurite.streams.algorithms.prompts.search import Search
from fulgurite.streams.trainer import reader
from fulgurite.streams.transactions import Transactions
from tests.streams.algorithms.algorithms_bus import at_work, trajectory, until
from tests.streams.test_trainer_partitions import add_partitions


@algorithm(name="counted")
def counted(given: Trajectory) -> Reward:
    return Reward(reward_id=given.rollout_id, rollout_id=given.rollout_id, value=1.0)


@algorithm(name="sized", reads="groups")
def sized(group: list[Trajectory]) -> Reward:
    return Reward(rollout_id="-".join(each.rollout_id for each in group), value=len(group))


async def put(kafka: KafkaSettings, partition: int, *given: Trajectory) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all")
    await producer.start()
    try:
        for each in given:
            await producer.send_and_wait(kafka.topic(topics.TRAJECTORIES), encode(each), b"k", partition)
    finally:
        await producer.stop()


async def test_they_are_read_and_committed_and_a_restart_goes_on_behind_them(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PARTITIONS_SECONDS", 0.3)
    async with at_work(kafka_settings, counted) as running:
        await put(kafka_settings, 0, trajectory("r0"))
        await until(kafka_settings, topics.REWARDS, 1)
        await add_partitions(kafka_settings, 4)
        for number in range(4):
            await put(kafka_settings, number, trajectory(f"r{number + 1}"))
        await until(kafka_settings, topics.REWARDS, 5)
        assert not running.done()
    async with at_work(kafka_settings, counted) as running:
        await put(kafka_settings, 3, trajectory("r5"))
        found = await until(kafka_settings, topics.REWARDS, 6)
        assert not running.done()
    given = Counter(decode(Reward, record.value).rollout_id for record in found)
    assert given == Counter({f"r{number}": 1 for number in range(6)})


async def test_a_group_does_not_close_before_partitions_nobody_heard_of_are_read(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PARTITIONS_SECONDS", 2.5)
    members = [trajectory(f"m{number}", group_id="g", group_size=4) for number in range(3)]
    await put(kafka_settings, 0, *members[:2])
    async with at_work(kafka_settings, sized, group_deadline_seconds=1.0):
        await add_partitions(kafka_settings, 3)
        await put(kafka_settings, 2, members[2])
        [record] = await until(kafka_settings, topics.REWARDS, 1)
    assert decode(Reward, record.value).rollout_id == "m0-m1-m2"


async def test_a_search_for_prompts_commits_them_too_and_nobody_reads_again_what_was_read(
    kafka_settings: KafkaSettings,
) -> None:
    topic = kafka_settings.topic(topics.TRAJECTORIES)
    known = [TopicPartition(topic, number) for number in range(2)]
    reading = SimpleNamespace(partitions=list(known), offsets={0: 3, 1: 4})
    transactions = Transactions(kafka_settings, "search", "search")
    await transactions.start()
    try:
        await transactions.committed(known)
        publishing = Publishing(Settings(kafka=kafka_settings), cast(Any, None), cast(Any, reading), transactions)
        search = Search(run_id="p", resource="prompt", version=1)
        await publishing.commit(search, [])
        await add_partitions(kafka_settings, 3)
        added = TopicPartition(topic, 2)
        reading.partitions.append(added)
        reading.offsets[2] = 5
        await publishing.commit(search, [])
        await transactions.start()  # which waits until what was committed can be read
        found = await transactions.committed([*known, added])
        assert [at and at.offset for at in found.values()] == [3, 4, 5]
        with pytest.raises(StartError, match="-2: read before"):
            await Commits(transactions, known).commit([], {added: 1})
        assert await transactions.committed([added]) == {added: OffsetAndMetadata(5, "")}
    finally:
        await asyncio.wait_for(transactions.close(), 10)

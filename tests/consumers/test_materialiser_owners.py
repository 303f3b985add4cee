"""Exactly once, whoever thinks it owns a partition: several writers, zombies among them, and a server that loses
answers, does inserts late and only in part, in ever other orders."""

from __future__ import annotations

import asyncio
import random

import pytest

from fulgurite.consumers.materialiser import topic as topic_module
from fulgurite.schemas import topics
from fulgurite.schemas.topics import Topic
from tests.consumers.materialiser_fakes import FakeRecord, Member, Server

PARTITIONS = 3
RECORDS = 40
VALUES = [b"{}", b"{}", b"poison", b"refused"]


@pytest.mark.parametrize("topic", [topics.ROLLOUTS, topics.SPANS], ids=lambda topic: topic.name)
@pytest.mark.parametrize("seed", range(15))
async def test_each_record_is_there_once_in_any_order_of_events(
    topic: Topic, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_module, "RETRY_SECONDS", (0.0, 0.002))
    monkeypatch.setattr(topic_module, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(topic_module, "SPLIT_BYTES", 300)
    rand = random.Random(f"{topic.name} {seed}")
    server = Server(rand, slow=12, trouble=0.1)
    values = [*VALUES, b"both"] if topic is topics.SPANS else VALUES
    logs = [[FakeRecord(at, rand.choice(values)) for at in range(RECORDS)] for _ in range(PARTITIONS)]
    members: list[Member] = []

    async def live(member: Member) -> None:
        """Fetches from where it began, a few records at a time; perhaps long after it lost the partitions."""
        await member.start()
        at = {number: member.consumer.at[number] for number in range(PARTITIONS)}
        while not all(member.buffers[number].closed or at[number] == RECORDS for number in at):
            number = rand.randrange(PARTITIONS)
            step = rand.randint(1, 8)
            member.append(number, logs[number][at[number] : at[number] + step])
            at[number] = min(RECORDS, at[number] + step)
            await asyncio.sleep(rand.choice([0, 0, 0.002]))

    lives: list[asyncio.Task[None]] = []
    for generation in range(3):
        for member in members:
            member.group.ours = False  # but it does not know
            if rand.random() < 0.3:
                await member.stop()
        members.append(member := Member(server, range(PARTITIONS), topic, batch_records=10, name=str(generation)))
        member.consumer.end = RECORDS
        lives.append(asyncio.create_task(live(member)))
        await asyncio.sleep(rand.uniform(0.005, 0.04))
    server.trouble = rand.choice([0.0, 0.05])
    # All of the log is logged as done by the last one.
    await members[-1].until(lambda: all(server.log.get(number, 0) == RECORDS for number in range(PARTITIONS)), 30)
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)
    for member in members:
        await member.stop()
    while server.left_behind:
        await asyncio.gather(*server.left_behind, return_exceptions=True)

    good, dead = set[tuple[int, int]](), set[tuple[int, int]]()
    for number, log in enumerate(logs):
        for record in log:
            place = (number, record.offset)
            dead |= {place} if record.value in (b"poison", b"refused", b"both") else set()
            good |= {place} if record.value in (b"{}", b"both") else set()
    assert server.rows == dict.fromkeys(good, 1)
    assert server.dead == dict.fromkeys(dead, 1)

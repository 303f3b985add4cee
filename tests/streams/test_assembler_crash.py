"""kill -9 of the assembler between the numbered steps of its contract, and of the broker under it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas import topics
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings, to_environment
from tests.streams.assembler_bus import Bus, assembling, connected, ids
from tests.streams.assembler_records import finished, llm_call, queued, reward, started

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def start_assembler(settings: KafkaSettings, step: str, count: int) -> subprocess.Popen[bytes]:
    """A process that kills itself when it reaches the step for the count-th time."""
    environment = os.environ | to_environment(
        {"kafka": settings.model_dump(exclude_none=True), "assembler": {"orphan_seconds": 2}}
    )
    command = [sys.executable, "-m", "tests.streams.assembler_driver", step, str(count)]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY)


async def until_dead(process: subprocess.Popen[bytes]) -> int:
    try:
        return await asyncio.to_thread(process.wait, 60)
    finally:
        process.kill()
        process.wait()


async def traffic(bus: Bus, first: int, count: int) -> None:
    """Rollouts one into the other, each with a span before and after its neighbour's end."""
    names = [f"r{number}" for number in range(first, first + count)]
    for name in names:
        await bus.send(queued(name), started(name), llm_call(name, 1, [1, 2], [3]))
    for name in names:
        await bus.send(llm_call(name, 2, [1, 2, 3, 4], [5]), reward(name, 1.0), finished(name))


STEPS = ["fenced", "replayed", "events", "data", "taken", "begun", "sent", "committed", "done"]


async def test_killed_at_every_step_in_turn(kafka_settings: KafkaSettings) -> None:
    """A second process carries on from wherever the first one died, and dies at the next step."""
    async with connected(kafka_settings) as bus:
        await bus.send(started("open"), llm_call("open", 1, [1], [2]), llm_call("ghost", 1, [1], [2]))
        for number, step in enumerate(STEPS):
            # The second time for the steps of a commit: there is then a commit to come back to.
            process = start_assembler(kafka_settings, step, 2 if step in STEPS[4:] else 1)
            await traffic(bus, number * 10, 10)
            if step in STEPS[4:]:
                await asyncio.sleep(0.5)
                await traffic(bus, 1_000 + number * 10, 5)
            assert await until_dead(process) == -9
        async with assembling(kafka_settings, orphan_seconds=2):
            await bus.send(llm_call("open", 2, [1, 2, 3], [4]), reward("open", 0.5), finished("open"))
            expected = 10 * len(STEPS) + 5 * len(STEPS[4:]) + 1
            await bus.until(topics.TRAJECTORIES, expected)
            await bus.until(topics.DEAD_LETTERS, 1)
        found = await bus.trajectories()
        letters = await bus.read(topics.DEAD_LETTERS)
    assert len(ids(found)) == len(set(ids(found))) == expected
    assert {(t.calls, len(t.sequences), t.partial) for t in found} == {(2, 1, "")}
    assert {t.metadata.get("label") for t in found if t.rollout_id != "open"} == set(ids(found)) - {"open"}
    assert [letter.key for letter in letters] == [b"ghost"]


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(tmp_path / "kafka") as server:
        yield server


async def test_the_broker_is_killed_under_it(own_kafka: EmbeddedKafka) -> None:
    settings = KafkaSettings(bootstrap_servers=own_kafka.bootstrap_servers, partitions=2)
    await create_topics(settings)
    kills = {"begun": 2, "sent": 4}

    def hook(reached: str) -> None:
        kills[reached] = kills.get(reached, 0) - 1
        if kills[reached] == 0:
            own_kafka.kill()

    async def revive() -> None:
        while True:
            await asyncio.sleep(0.1)
            if not own_kafka.running:
                with contextlib.suppress(StartError):  # killed again while it waited
                    await asyncio.to_thread(own_kafka.start)

    reviving = asyncio.create_task(revive())
    async with connected(settings) as bus, assembling(settings, hook=hook):
        for number in range(6):
            await traffic(bus, number * 10, 10)
            await asyncio.sleep(0.3)
        await bus.until(topics.TRAJECTORIES, 60, seconds=120)
        found = await bus.trajectories()
    reviving.cancel()
    await asyncio.gather(reviving, return_exceptions=True)
    assert len(found) == len(set(ids(found))) == 60
    assert {(t.calls, t.reward, t.partial) for t in found} == {(2, 1.0, "")}

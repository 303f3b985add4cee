"""kill -9 of the assembler between the numbered steps of its contract, and of the broker under it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas import topics
from fulgurite.schemas.settings import KafkaSettings, to_environment
from tests.streams.assembler_bus import Bus, Mortal, assembling, connected, ids, known_translator, translating
from tests.streams.assembler_records import finished, llm_call, queued, reward, started

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def start_assembler(settings: KafkaSettings, step: str, count: int) -> subprocess.Popen[bytes]:
    """A process that kills itself when it reaches the step for the count-th time."""
    own = {"orphan_seconds": 2, "otlp_settle_seconds": 0.2}
    environment = os.environ | to_environment({"kafka": settings.model_dump(exclude_none=True), "assembler": own})
    command = [sys.executable, "-m", "tests.streams.assembler_driver", step, str(count)]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY)


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
        sent = 0
        for step in STEPS:
            # The second time for the steps of a commit: there is then a commit to come back to.
            process = start_assembler(kafka_settings, step, 2 if step in STEPS[4:] else 1)
            while process.poll() is None:
                await traffic(bus, sent, 4)
                sent += 4
                await asyncio.sleep(0.2)
            assert process.returncode == -9
        async with assembling(kafka_settings, orphan_seconds=2):
            await bus.send(llm_call("open", 2, [1, 2, 3], [4]), reward("open", 0.5), finished("open"))
            await bus.until(topics.TRAJECTORIES, sent + 1)
            await bus.until(topics.DEAD_LETTERS, 1)
        found = await bus.trajectories()
        letters = await bus.read(topics.DEAD_LETTERS)
    assert len(ids(found)) == len(set(ids(found))) == sent + 1
    assert {(t.calls, len(t.sequences), t.partial) for t in found} == {(2, 1, "")}
    assert {t.metadata.get("label") for t in found if t.rollout_id != "open"} == set(ids(found)) - {"open"}
    assert [letter.key for letter in letters] == [b"ghost"]


async def test_killed_at_every_step_while_rollouts_wait_for_rewards_in_otlp(kafka_settings: KafkaSettings) -> None:
    """Some overtake those that wait, the translator comes and goes; each is there once, with its reward."""
    await known_translator(kafka_settings)
    async with connected(kafka_settings) as bus:
        sent = 0
        for step in ["data", "translated", "translated", "taken", "sent", "committed", "done"]:
            process = start_assembler(kafka_settings, step, 2)
            while process.poll() is None:
                for name in (f"native{sent}", f"native{sent + 1}"):
                    await bus.rollout(name)
                await bus.reward_as_otlp(f"otlp{sent}", 1.0)
                await bus.ends_without(f"otlp{sent}")
                sent += 2
                async with translating(kafka_settings):
                    await asyncio.sleep(1.0)
            assert process.returncode == -9
        async with assembling(kafka_settings, otlp_settle_seconds=0.2), translating(kafka_settings):
            found = await bus.until(topics.TRAJECTORIES, sent // 2 * 3)
            assert len(found) == sent // 2 * 3
        trajectories = await bus.trajectories()
        assert await bus.read(topics.DEAD_LETTERS) == []
    assert len(ids(trajectories)) == len(set(ids(trajectories)))
    assert {(one.reward, one.partial) for one in trajectories} == {(1.0, "")}


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(tmp_path / "kafka") as server:
        yield server


async def test_the_broker_is_killed_under_it(own_kafka: EmbeddedKafka) -> None:
    settings = KafkaSettings(bootstrap_servers=own_kafka.bootstrap_servers, partitions=2)
    await create_topics(settings)
    mortal = Mortal(own_kafka, {"begun": 1, "sent": 1})
    reviving = asyncio.create_task(mortal.revive())
    sent = 0
    async with connected(settings) as bus, assembling(settings, hook=mortal.hook):
        while any(mortal.kills.values()) or sent < 20:
            await traffic(bus, sent, 4)
            sent += 4
            await asyncio.sleep(0.2)
        await bus.until(topics.TRAJECTORIES, sent, seconds=120)
        found = await bus.trajectories()
    reviving.cancel()
    assert len(found) == len(set(ids(found))) == sent
    assert {(t.calls, t.reward, t.partial) for t in found} == {(2, 1.0, "")}


async def test_the_broker_is_killed_while_rollouts_wait_for_rewards_in_otlp(own_kafka: EmbeddedKafka) -> None:
    """For longer than they may wait: the time without it does not count."""
    settings = KafkaSettings(bootstrap_servers=own_kafka.bootstrap_servers, partitions=2)
    await create_topics(settings)
    await known_translator(settings)
    own: dict[str, Any] = {"otlp_settle_seconds": 0.2, "otlp_wait_seconds": 15.0}
    async with connected(settings) as bus, assembling(settings, **own):
        for number in range(4):
            await bus.reward_as_otlp(f"otlp{number}", 1.0)
            await bus.ends_without(f"otlp{number}")
        await asyncio.sleep(1.0)
        own_kafka.kill()
        await asyncio.sleep(20.0)
        await asyncio.to_thread(own_kafka.start)
        async with translating(settings):
            await bus.until(topics.TRAJECTORIES, 4, seconds=90)
        found = await bus.trajectories()
    assert {(one.reward, one.partial) for one in found} == {(1.0, "")}
    assert len(ids(found)) == len(set(ids(found))) == 4

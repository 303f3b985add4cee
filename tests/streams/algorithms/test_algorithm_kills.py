"""kill -9 of `fulgurite algorithm`, the process, while it works: every input's event is there once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, to_environment
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms import algorithm
from tests.streams.algorithms.algorithms_bus import send, trajectory, until

REPOSITORY = Path(__file__).parents[3]

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@algorithm(reads="groups")
async def sizes(group: list[Trajectory]) -> AsyncIterator[Reward]:
    await asyncio.sleep(0.3)  # so that it dies with some groups done and others at work
    for member in group:
        yield Reward(rollout_id=member.rollout_id, name="size", value=len(group))


def start(kafka: KafkaSettings) -> subprocess.Popen[bytes]:
    environment = os.environ | to_environment({"kafka": kafka.model_dump(exclude_none=True)})
    command = [sys.executable, "-m", "fulgurite.infra", "algorithm", f"{__name__}:sizes"]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY)


@pytest.mark.timeout(400)
async def test_killed_in_the_middle_of_its_work(kafka_settings: KafkaSettings) -> None:
    groups = 60
    sent = [trajectory(f"g{g}-r{m}", group_id=f"g{g}", group_size=3) for m in range(3) for g in range(groups)]
    await send(kafka_settings, topics.TRAJECTORIES, *sent[: 2 * groups])
    process = start(kafka_settings)
    try:
        await until(kafka_settings, topics.ALGORITHM_STATE, groups, seconds=120)  # every group is open
        await send(kafka_settings, topics.TRAJECTORIES, *sent[2 * groups :])
        await until(kafka_settings, topics.REWARDS, 3, seconds=120)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process = start(kafka_settings)
        records = await until(kafka_settings, topics.REWARDS, 3 * groups, seconds=120)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    rewards = [decode(Reward, record.value) for record in records]
    assert sorted(reward.rollout_id for reward in rewards) == sorted(given.rollout_id for given in sent)
    assert {reward.value for reward in rewards} == {3.0}

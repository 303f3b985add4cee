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
from tests.streams.trainer_world import read_topic

REPOSITORY = Path(__file__).parents[3]

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@algorithm(reads="groups")
async def sizes(group: list[Trajectory]) -> AsyncIterator[Reward]:
    await asyncio.sleep(0.01)
    for member in group:
        yield Reward(rollout_id=member.rollout_id, name="size", value=len(group))


def start(kafka: KafkaSettings) -> subprocess.Popen[bytes]:
    environment = os.environ | to_environment({"kafka": kafka.model_dump(exclude_none=True)})
    command = [sys.executable, "-m", "fulgurite.infra", "algorithm", f"{__name__}:sizes"]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY)


async def test_killed_again_and_again(kafka_settings: KafkaSettings) -> None:
    groups, lives = 60, 2
    # Members of a group come one after the other round, so that groups are open at every moment.
    sent = [trajectory(f"g{g}-r{m}", group_id=f"g{g}", group_size=3) for m in range(3) for g in range(groups)]
    await send(kafka_settings, topics.TRAJECTORIES, *sent[: 2 * groups])
    process = start(kafka_settings)
    try:
        for life in range(lives):
            first = 2 * groups + life * groups // lives
            done = len(await read_topic(kafka_settings, topics.REWARDS))
            await send(kafka_settings, topics.TRAJECTORIES, *sent[first : first + groups // lives])
            await until(kafka_settings, topics.REWARDS, done + 3, seconds=60)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            process = start(kafka_settings)
        records = await until(kafka_settings, topics.REWARDS, 3 * groups, seconds=60)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    rewards = [decode(Reward, record.value) for record in records]
    assert sorted(reward.rollout_id for reward in rewards) == sorted(given.rollout_id for given in sent)
    assert {reward.value for reward in rewards} == {3.0}

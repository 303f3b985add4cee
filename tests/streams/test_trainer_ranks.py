"""A trainer of two ranks: kill -9 of either, anywhere, and it ends with the bits it would have had."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fulgurite.schemas.settings import KafkaSettings, Settings, to_environment
from fulgurite.schemas.training import TrainingStep
from tests.streams.test_trainer_kills import settings_of, weights
from tests.streams.trainer_world import World, all_once, build_model, training_events

pytestmark = pytest.mark.timeout(600)  # processes under torchrun, which share two cores with other tests

DEATHS = (
    "1:step@2",  # while rank 0 waits for it in a collective
    "0:write_checkpoint@2",  # between 3 and 4 of the contract; rank 1 waits for the next command
)


def train(settings: Settings, folder: Path, *deaths: str) -> int:
    folder.mkdir()
    environment = to_environment(
        {
            "kafka": settings.kafka.model_dump(exclude_defaults=True),
            "trainer": settings.trainer.model_dump(exclude_defaults=True),
        }
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(len(deaths))]
    command = [sys.executable, "-m", *launcher, "-m", "tests.streams.trainer_ranks", str(folder), *deaths]
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **environment, **quiet}, stdout=log, stderr=log)
        try:
            return process.wait(280)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end:\n{(folder / 'log').read_text()[-8_000:]}")
        finally:
            if process.poll() is None:  # ranks are in sessions of their own
                for running in (*psutil.Process(process.pid).children(recursive=True), process):
                    running.kill()
                process.wait()


@pytest.mark.chaos
@pytest.mark.slow
async def test_a_killed_rank_costs_time_and_nothing_else(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", seed=3)
    runs: list[Settings] = []
    for name in ("calm", "killed"):
        settings = settings_of(kafka_settings, model, tmp_path / name, name)
        trainer = settings.trainer.model_copy(update={"zero_stage": 2, "steps": 4})
        runs.append(settings.model_copy(update={"trainer": trainer}))
    calm, killed = runs
    async with World(kafka_settings).running() as world:
        assert await asyncio.to_thread(train, calm, tmp_path / "calm-log") == 0
        code = await asyncio.to_thread(train, killed, tmp_path / "killed-log", *DEATHS)
    assert code == 0, (tmp_path / "killed-log" / "log").read_text()[-8_000:]
    assert {path.name for path in (tmp_path / "killed-log").iterdir()} == {
        "log",
        *(d.replace(":", "-") for d in DEATHS),
    }

    assert weights(killed) == weights(calm), "the weights are not the same bits"
    after = await training_events(kafka_settings, "killed")
    assert [event.step for event in after if isinstance(event, TrainingStep)] == [1, 2, 3, 4]
    rollouts = {rollout for rollout in world.queued if rollout.startswith("killed-")}
    assert set(all_once(after)) == rollouts

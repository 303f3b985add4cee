"""The trainer against the real broker, with a real (tiny) model and a hand-written rest of the world."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fulgurite.schemas.checksum import folder_of, folder_sha256
from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import serve
from tests.streams.trainer_world import World, all_once, build_model, training_events

RUN = "run"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def trainer_settings(tiny_model: Path, tmp_path: Path) -> TrainerSettings:
    return TrainerSettings(
        run_id=RUN,
        model=tiny_model,
        output=tmp_path / "policy",
        tasks="tests.streams.trainer_world:bandit",
        steps=3,
        groups_per_step=4,
        group_size=4,
        pacing_staleness=0,
        learning_rate=2e-2,
        warmup_steps=2,
        group_deadline_seconds=60,
    )


async def train(kafka: KafkaSettings, trainer: TrainerSettings, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        await serve(Settings(kafka=kafka, trainer=trainer), asyncio.Event())


async def test_reward_rises_and_every_rollout_is_accounted_for(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    def alter(trajectory: Trajectory) -> Trajectory:
        if trajectory.rollout_id.endswith("3-r1"):
            return trajectory.model_copy(update={"status": "failed", "sequences": [], "reward": None})
        if trajectory.rollout_id.endswith("5-r2"):
            return trajectory.model_copy(update={"partial": "no_reward", "reward": None})
        return trajectory

    trainer = trainer_settings.model_copy(
        update={"steps": 15, "groups_per_step": 8, "group_size": 8, "pacing_staleness": 1}
    )
    async with World(kafka_settings, alter).running() as world:
        await train(kafka_settings, trainer)
    events = await training_events(kafka_settings, RUN)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert [step.step for step in steps] == list(range(1, 16))
    assert [step.version_out for step in steps] == list(range(2, 17))
    assert [type(events[0]), type(events[-1])] == [RunStarted, RunFinished]
    first, last = steps[0].reward_mean, steps[-1].reward_mean
    assert last > first + 0.3, f"reward went from {first} to {last}"
    assert max(step.staleness_max for step in steps) <= 1
    assert max(step.metrics["sampling/sampling_logp_difference/max"] for step in steps[:1]) < 1e-5

    fates = all_once(events)
    assert set(fates) == set(world.queued)
    assert len(world.queued) == 15 * 8 * 8
    assert {f for i, f in fates.items() if i.endswith("3-r1")} == {"failed"}
    assert {f for i, f in fates.items() if i.endswith("5-r2")} == {"no_reward"}
    assert set(fates.values()) <= {"trained", "failed", "no_reward", "zero_variance"}

    newest = world.versions[-1]
    kept = sorted((trainer.output / RUN).iterdir())
    assert len(kept) == trainer.keep_versions
    assert (folder_of(newest.uri) / "tokenizer.json").is_file()
    assert folder_sha256(folder_of(newest.uri)) == newest.sha256

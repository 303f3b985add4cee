"""Replacements of dropped groups: ever more slowly where they failed, at once where they only teach nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import asking, serve
from fulgurite.streams.trainer.asking import Pauses
from tests.streams.trainer_world import World, all_once, build_model, training_events

SILENT = 8


def test_only_what_failed_waits_longer_and_longer() -> None:
    pauses = Pauses()
    failed = [now for now in range(300) if pauses.replaceable(float(now), 4, 4)]
    assert failed == [0, 2, 6, 14, 30, 62, 122, 182, 242]
    pauses = Pauses()
    assert [now / 2 for now in range(20) if pauses.replaceable(now / 2, 4, 0)] == list(range(10))


def test_groups_without_a_signal_do_not_wait_behind_those_that_failed() -> None:
    pauses = Pauses()
    assert pauses.replaceable(0.0, 5, 1) == 5
    assert pauses.replaceable(0.5, 5, 1) == 0
    assert pauses.replaceable(1.0, 5, 1) == 4
    assert pauses.replaceable(1.5, 1, 1) == 0
    assert pauses.replaceable(2.0, 1, 1) == 1
    assert pauses.replaceable(4.0, 3, 9) == 0
    assert pauses.replaceable(6.0, 3, 9) == 3
    assert pauses.replaceable(99.0, 0, 0) == 0


@pytest.mark.parametrize("changes", [{"zero_variance": "refill"}, {"zero_variance": "keep", "incomplete": "drop"}])
async def test_a_window_of_dynamic_sampling_is_full_as_fast_as_agents_answer(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    """Doubled each time, the pauses would add up to a minute."""
    monkeypatch.setattr(asking, "REPLACE_SECONDS", (0.1, 60.0))

    def alter(trajectory: Trajectory) -> Trajectory:
        group, member = (int(part[1:]) for part in trajectory.rollout_id.split("-")[1:])
        if group < SILENT and "incomplete" in changes and member == 0:
            return trajectory.model_copy(update={"status": "failed", "sequences": [], "reward": None})
        return trajectory.model_copy(update={"reward": 1.0 if group < SILENT else float(member)})

    trainer = TrainerSettings.model_validate(
        {
            "run_id": "run", "model": build_model(tmp_path / "model", 3), "output": tmp_path / "policy", "steps": 1,
            "tasks": "tests.streams.trainer_world:bandit", "groups_per_step": 1, "group_size": 3, **changes,
        }
    )  # fmt: skip
    async with asyncio.timeout(30), World(kafka_settings, alter).running():
        await serve(Settings(kafka=kafka_settings, trainer=trainer), asyncio.Event())
    events = await training_events(kafka_settings, "run")
    (step,) = [event for event in events if isinstance(event, TrainingStep)]
    assert step.rollout_ids == [f"run-g{SILENT}-r{member}" for member in range(3)]
    assert len(all_once(events)) == 3 * (SILENT + 1)
    assert step.metrics["timing_s/wait"] < 20

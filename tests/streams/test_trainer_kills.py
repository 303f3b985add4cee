"""kill -9 between any two steps of the contract: nothing lost, nothing twice, the same weights bit for bit."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fulgurite.schemas.codec import decode
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings, Settings, SourceSettings, TrainerSettings, to_environment
from fulgurite.schemas.topics import RESOURCES
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingStep
from fulgurite.streams.trainer import serve
from tests.streams.trainer_world import World, all_once, build_model, read_topic, training_events

LIVES = [
    "sent@0",  # between 4 and 5 of the very first transaction: the run has not begun
    "committed@0",  # after 5 of the first transaction
    "fill@1",  # between 1 and 2
    "optimize@1",  # between 2 and 3
    "half_written@2",  # in 3
    "write_checkpoint@2",  # between 3 and 4
    "begun@3",  # at the start of 4
    "sent@4",  # between 4 and 5
    "committed@4",  # between 5 and 6
    "remove_old@5",  # after 6
    "sent@6",  # in the last transaction
]
STEPS = 6


def settings_of(kafka: KafkaSettings, model: Path, output: Path, run_id: str) -> Settings:
    trainer = TrainerSettings(
        run_id=run_id,
        model=model,
        output=output,
        tasks="tests.streams.trainer_world:bandit",
        steps=STEPS,
        groups_per_step=3,
        group_size=3,
        pacing_staleness=0,  # every group asked for is in the next window: which ones does not depend on timing
        learning_rate=1e-2,
        warmup_steps=3,
        keep_versions=3,
    )
    return Settings(kafka=kafka, trainer=trainer)


def live_and_die(settings: Settings, lives: list[str], log: Path) -> int:
    environment = to_environment(
        {
            "kafka": settings.kafka.model_dump(exclude_defaults=True),
            "trainer": settings.trainer.model_dump(exclude_defaults=True),
            "source": settings.source.model_dump(exclude_defaults=True),
        }
    )
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.streams.trainer_lives", *lives],
            env={**os.environ, **environment},
            stderr=stderr,
            start_new_session=True,
        )
        try:
            return process.wait(150)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the lives did not end:\n{log.read_text()}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its lives too
                process.wait()


def weights(settings: Settings) -> dict[int, bytes]:
    folder = settings.trainer.output / settings.trainer.run_id
    found = sorted(folder.glob("v*/weights/model.safetensors"))
    first = int(found[0].parent.parent.name[1:])
    return {int(path.parent.parent.name[1:]) - first: path.read_bytes() for path in found}


@pytest.mark.chaos
@pytest.mark.slow
async def test_killed_between_every_two_steps_it_ends_as_if_it_had_not_been(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    model = build_model(tmp_path / "model", seed=3)
    calm = settings_of(kafka_settings, model, tmp_path / "calm", "calm")
    killed = settings_of(kafka_settings, model, tmp_path / "killed", "killed")
    async with World(kafka_settings).running() as world:
        async with asyncio.timeout(60):
            await serve(calm, asyncio.Event())
        code = await asyncio.to_thread(live_and_die, killed, LIVES, tmp_path / "log")
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    assert "nothing to do" in log.splitlines()[-2], log

    expected, found = weights(calm), weights(killed)
    assert len(expected) == killed.trainer.keep_versions
    assert found == expected, "the weights are not the same bits"

    before, after = await training_events(kafka_settings, "calm"), await training_events(kafka_settings, "killed")
    steps = [event for event in after if isinstance(event, TrainingStep)]
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert [step.version_out - step.version_in for step in steps] == [1] * STEPS
    assert [event.loss for event in steps] == [event.loss for event in before if isinstance(event, TrainingStep)]
    assert sum(isinstance(event, RunFinished) for event in after) == 1
    assert sum(isinstance(event, RunStarted) for event in after) >= len(LIVES) - 2

    rollouts = {rollout for rollout in world.queued if rollout.startswith("killed-")}
    assert set(all_once(after)) == rollouts
    assert len(rollouts) == STEPS * 9
    announced = [decode(ResourceVersion, record.value) for record in await read_topic(kafka_settings, RESOURCES)]
    numbers = [version.version for version in announced]
    assert numbers == list(range(1, 2 * (STEPS + 1) + 1)), "version numbers go on over runs, each once"


@pytest.mark.chaos
@pytest.mark.slow
async def test_a_replay_killed_between_steps_ends_as_if_it_had_not_been(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    """Its windows do not depend on timing, and so it may run ahead: two windows of the source are in three of its. They
    slide, and so what earlier windows had is in its checkpoints too."""
    live = settings_of(kafka_settings, build_model(tmp_path / "model", seed=3), tmp_path, "live")
    async with World(kafka_settings).running():
        async with asyncio.timeout(60):
            await serve(live, asyncio.Event())

    def replay(name: str) -> Settings:
        trainer = TrainerSettings(
            run_id=name,
            resource=name,
            output=tmp_path,
            groups_per_step=2,
            keep_versions=3,
            overlap_groups=3,
            incomplete="fill",
            zero_variance="keep",  # which groups differ hangs on the last bits of what the live run learned
        )
        return Settings(kafka=kafka_settings, trainer=trainer, source=SourceSettings(run_id="live"))

    async with asyncio.timeout(60):
        await serve(replay("calm"), asyncio.Event())
    lives = ["fill@1", "write_checkpoint@2", "sent@3", "committed@4"]
    code = await asyncio.to_thread(live_and_die, replay("killed"), lives, tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()
    assert weights(replay("killed")) == weights(replay("calm"))
    before, after = [await training_events(kafka_settings, name) for name in ("calm", "killed")]
    steps = [event for event in after if isinstance(event, TrainingStep)]
    expected = [event for event in before if isinstance(event, TrainingStep)]
    assert [(e.rollout_ids, e.again) for e in steps] == [(e.rollout_ids, e.again) for e in expected]
    assert all(event.again for event in steps[2:])
    assert all_once(after) == all_once(before)

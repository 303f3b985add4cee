"""Runs of one name and one output on several logs: none removes, or goes on from, what another one committed."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from fulgurite.infra.topics import create_topics
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import RunStarted
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import serve
from fulgurite.streams.trainer.checkpoints import Checkpoints, RunState
from fulgurite.streams.trainer.windows import Windows
from tests.streams.test_windows import SHAPE
from tests.streams.trainer_world import World, all_once, build_model, training_events


def settings_of(kafka: KafkaSettings, folder: Path) -> Settings:
    trainer = TrainerSettings(
        run_id="run", model=folder / "model", output=folder / "policy", tasks="tests.streams.trainer_world:bandit",
        steps=1, groups_per_step=2, group_size=2, zero_variance="keep", pacing_staleness=0,
    )  # fmt: skip
    return Settings(kafka=kafka, trainer=trainer)


async def begin(settings: Settings) -> None:
    """Up to its first version."""
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    while True:
        if running.done() or await training_events(settings.kafka, "run"):
            break
        await asyncio.sleep(0.05)
    stop.set()
    await running


async def test_a_run_on_another_log_leaves_a_committed_version_where_it_is(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    build_model(tmp_path / "model", seed=3)
    ours = settings_of(kafka_settings, tmp_path)
    theirs = settings_of(kafka_settings.model_copy(update={"topic_prefix": "other."}), tmp_path)
    await create_topics(theirs.kafka)
    held: list[Trajectory] = []

    async with asyncio.timeout(60), World(ours.kafka, held.append).running() as world:  # nobody answers
        await begin(ours)
        version = tmp_path / "policy" / "run" / "v000001"
        before = (version / "state.json").read_bytes()
        with pytest.raises(StartError, match=r"v000001 is .*step 0.* has other offsets of this run .*on purpose, move"):
            await serve(theirs, asyncio.Event())
        assert (version / "state.json").read_bytes() == before

        shutil.move(tmp_path / "policy" / "run", tmp_path / "aside")
        await begin(theirs)
        with pytest.raises(StartError, match=r"v000001 was not written by this run, but by one of the same name"):
            await serve(ours, asyncio.Event())
        shutil.rmtree(tmp_path / "policy" / "run")
        shutil.move(tmp_path / "aside", tmp_path / "policy" / "run")
        while True:
            if len(held) == 4:
                break
            await asyncio.sleep(0.05)
        for trajectory in held:
            await world.send(trajectory)
        await serve(ours, asyncio.Event())
    events = await training_events(ours.kafka, "run")
    assert set(all_once(events)) == set(world.queued)
    assert len({event.lineage for event in events if isinstance(event, RunStarted)} - {""}) == 1


def checkpoints(output: Path, version: int, step: int, lineage: str) -> Checkpoints:
    found = Checkpoints(output, "run")
    state = RunState(run_id="run", resource="p", version=version, step=step, lineage=lineage, offsets={}, asked=0)
    found.write(state, Windows(SHAPE), lambda to: (to / "w").touch(), Path.touch)
    return found


@pytest.mark.parametrize(
    ("written_for", "lineages", "refused"),
    [("a", {"a"}, False), ("a", {"b", "a"}, False), ("a", {"b"}, True), ("", {"b"}, False), ("a", None, False)],
)
@pytest.mark.parametrize("step", [0, 1])
def test_what_is_of_another_lineage_is_neither_removed_nor_loaded(
    tmp_path: Path, step: int, written_for: str, lineages: set[str] | None, refused: bool
) -> None:
    """An empty one is of before; where a run's starts do not say, nothing is known."""
    found = checkpoints(tmp_path, 7, step, written_for)
    committed = 6 if step else None
    if refused:
        with pytest.raises(StartError, match=r"on another log"):
            found.load(7, lineages)
        with pytest.raises(StartError, match=r"v000007 is .*has other offsets of this run"):
            found.uncommitted(committed, lineages).remove()
        assert found.load(7)
    else:
        assert found.load(7, lineages)
        assert [folder.name for folder in found.uncommitted(committed, lineages).remove()] == ["v000007"]


def test_of_a_run_that_has_begun_by_its_offsets_nothing_is_a_leftover_of_the_first_transaction(tmp_path: Path) -> None:
    found = checkpoints(tmp_path, 1, 0, "a")
    with pytest.raises(StartError, match="does not know this run"):
        found.uncommitted(None, {"a"}, begun=True).remove()
    assert found.load(1)

"""A start that sleeps while a second one takes the run over: it ends fenced, and takes nothing of the second one's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulgurite.schemas.errors import Fenced
from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import RunStarted, TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import checkpoints, recovery, serve
from fulgurite.streams.trainer.checkpoints import Checkpoints, RunState
from fulgurite.streams.trainer.ownership import Ownership
from fulgurite.streams.trainer.windows import Windows
from fulgurite.streams.transactions import Transactions
from tests.streams.test_windows import SHAPE
from tests.streams.trainer_world import World, all_once, build_model, load_one_at_a_time, training_events

ROLLOUTS = 4
"""A step's."""

PLACES: dict[str, tuple[Any, str, str]] = {
    "asked the log": (recovery, "committed_run", "after"),
    "looked for others": (Ownership, "check", "after"),
    "found": (Transactions, "confirm", "before"),
    "confirmed": (Transactions, "confirm", "after"),
    "loaded the checkpoint": (recovery, "_limits", "before"),
}
NEW = ("asked the log", "found", "confirmed")
"""Those that the start of a new run passes, too."""


def settings_of(kafka: KafkaSettings, folder: Path) -> Settings:
    trainer = TrainerSettings(
        run_id="run", model=build_model(folder / "model", seed=3), output=folder / "policy", steps=2, keep_versions=2,
        tasks="tests.streams.trainer_world:bandit", groups_per_step=2, group_size=2, pacing_staleness=0,
        zero_variance="keep",
    )  # fmt: skip
    return Settings(kafka=kafka, trainer=trainer)


def sleep_once(monkeypatch: pytest.MonkeyPatch, place: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Whoever comes there first sets the one and waits for the other."""
    asleep, woken = asyncio.Event(), asyncio.Event()
    owner, name, when = PLACES[place]
    act, sleeps = getattr(owner, name), iter([True])

    async def sleepily(*arguments: Any) -> Any:
        is_sleeper = next(sleeps, False)
        found = await act(*arguments) if when == "after" else None
        if is_sleeper:
            asleep.set()
            await woken.wait()
        return found if when == "after" else await act(*arguments)

    monkeypatch.setattr(owner, name, sleepily)
    return asleep, woken


def write_slowly(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Whoever writes the next version sets the one when its weights are there, and waits for the other."""
    writing, go_on = threading.Event(), threading.Event()
    sha256 = checkpoints.folder_sha256

    def slowly(folder: Path) -> str:
        if ".tmp-" in str(folder) and not writing.is_set():
            writing.set()
            go_on.wait(30)
        return sha256(folder)

    monkeypatch.setattr(checkpoints, "folder_sha256", slowly)
    return writing, go_on


def crash(output: Path, version: int, step: int) -> None:
    """Leaves a version that is not committed, and what is half written."""
    state = RunState(run_id="run", resource="policy", version=version, step=step, offsets={}, asked=0)
    Checkpoints(output, "run").write(state, Windows(SHAPE), lambda to: (to / "w").touch(), Path.touch)
    (output / "run" / ".tmp-v000009-dead" / "weights").mkdir(parents=True)
    (output / "run" / ".tmp-choice-dead").touch()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 (threads and topics tell nobody)
        await asyncio.sleep(0.02)


async def until_told(kafka: KafkaSettings, kind: type) -> None:
    while not any(isinstance(event, kind) for event in await training_events(kafka, "run")):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


class Answers:
    """Withheld until a step's are given."""

    def __init__(self) -> None:
        self._held: list[Trajectory] = []

    def hold(self, answer: Trajectory) -> None:
        self._held.append(answer)

    async def give(self, world: World, steps: int) -> None:
        for _ in range(steps):
            await until(lambda: len(self._held) >= ROLLOUTS)
            for _ in range(ROLLOUTS):
                await world.send(self._held.pop(0))


async def begin(settings: Settings) -> None:
    """A run's first life, up to its first version."""
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    await until_told(settings.kafka, RunStarted)
    stop.set()
    await running


@pytest.mark.parametrize("meanwhile", ["writes", "commits", "ends"])
@pytest.mark.parametrize(
    ("place", "is_new"), [(place, is_new) for place in PLACES for is_new in (False, True) if not is_new or place in NEW]
)
async def test_a_start_that_wakes_up_behind_its_successor(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    place: str, is_new: bool, meanwhile: str,
) -> None:  # fmt: skip
    load_one_at_a_time(monkeypatch)
    settings, answers = settings_of(kafka_settings, tmp_path), Answers()
    output, steps = settings.trainer.output, 0
    async with asyncio.timeout(60), World(kafka_settings, answers.hold).running() as world:
        if not is_new:
            await begin(settings)
        crash(output, version=1 if is_new else 2, step=0 if is_new else 1)
        asleep, woken = sleep_once(monkeypatch, place)
        first = asyncio.create_task(serve(settings, asyncio.Event()))
        await asleep.wait()
        writing, go_on = write_slowly(monkeypatch)
        if meanwhile != "writes":
            go_on.set()
        second = asyncio.create_task(serve(settings, asyncio.Event()))
        match meanwhile, is_new:
            case "writes", _:
                steps = 0 if is_new else 1
                await answers.give(world, steps)
                await until(writing.is_set)
            case "commits", True:
                await until_told(kafka_settings, RunStarted)
            case "commits", False:
                steps = 1
                await answers.give(world, steps)
                await until_told(kafka_settings, TrainingStep)
            case _:
                steps = 2
                await answers.give(world, steps)
                await second
        woken.set()
        with pytest.raises(Fenced):
            await first
        if meanwhile == "commits":
            Checkpoints(output, "run").load(1 if is_new else 2)
        go_on.set()
        await answers.give(world, 2 - steps)
        await second

    Checkpoints(output, "run").load(3)
    events = await training_events(kafka_settings, "run")
    told = [(event.step, event.version_out) for event in events if isinstance(event, TrainingStep)]
    assert told == [(1, 2), (2, 3)]
    assert set(all_once(events)) == set(world.queued)


async def test_what_a_start_writes_that_slept_until_the_run_was_over_goes_with_the_next_one(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of the model that the run began with, and newer than the run's last version."""
    load_one_at_a_time(monkeypatch)
    settings, answers = settings_of(kafka_settings, tmp_path), Answers()
    folder = settings.trainer.output / "run"
    async with asyncio.timeout(60), World(kafka_settings, answers.hold).running() as world:
        crash(settings.trainer.output, version=1, step=0)
        asleep, woken = sleep_once(monkeypatch, "confirmed")
        first = asyncio.create_task(serve(settings, asyncio.Event()))
        await asleep.wait()
        second = asyncio.create_task(serve(settings, asyncio.Event()))
        await answers.give(world, 2)
        await second
        newest = max(path.name for path in folder.glob("v*"))
        woken.set()
        with pytest.raises(Fenced):
            await first
        assert max(path.name for path in folder.glob("v*")) > newest
        await serve(settings, asyncio.Event())
    assert max(path.name for path in folder.glob("v*")) == newest
    assert not list(folder.glob(".tmp-*"))

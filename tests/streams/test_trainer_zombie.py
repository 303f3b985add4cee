"""Two trainers of one run at a time: exactly one goes on, the one that fenced the other, wherever that one was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError

from fulgurite.schemas.errors import Fenced
from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import RunFinished, TrainingStep
from fulgurite.streams.trainer import recovery, serve
from tests.streams.trainer_world import World, all_once, build_model, training_events

TRANSACTION = 3
"""In which the first trainer sleeps: behind its claim and the starting weights the one of its first step."""
LOADS = 2
"""The second one's."""


def settings_of(kafka: KafkaSettings, folder: Path, steps: int) -> Settings:
    trainer = TrainerSettings(
        run_id="run",
        model=build_model(folder / "model", seed=3),
        output=folder / "policy",
        tasks="tests.streams.trainer_world:bandit",
        steps=steps,
        groups_per_step=2,
        group_size=2,
        zero_variance="keep",
    )
    return Settings(kafka=kafka, trainer=trainer)


async def test_of_two_starts_during_one_load_the_later_one_goes_on(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one learns of the second with its first transaction, when it has written the version's folder."""
    begun = [asyncio.Event(), asyncio.Event()]
    wait_for = [begun[1], asyncio.Event()]
    load, loads = recovery._load, iter((0, 1))  # pyright: ignore[reportPrivateUsage]

    async def load_slowly(*arguments: Any) -> Any:
        number = next(loads)
        begun[number].set()
        await wait_for[number].wait()
        return await load(*arguments)

    monkeypatch.setattr(recovery, "_load", load_slowly)
    settings = settings_of(kafka_settings, tmp_path, steps=1)
    async with World(kafka_settings).running(), asyncio.timeout(120):
        first = asyncio.create_task(serve(settings, asyncio.Event()))
        await begun[0].wait()
        second = asyncio.create_task(serve(settings, asyncio.Event()))
        with pytest.raises(Fenced, match="another process uses"):
            await first
        assert [folder.name for folder in (settings.trainer.output / "run").glob("v*")] == ["v000001"]
        wait_for[1].set()
        await second
    assert "v000001: a predecessor wrote it" in caplog.text
    events = await training_events(kafka_settings, "run")
    assert [type(event).__name__ for event in events] == ["RunStarted", "TrainingStep", "RunFinished"]
    assert all_once(events)


@pytest.mark.slow
async def test_it_does_not_commit_a_version_whose_files_its_successor_has_removed(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep, woken, loading, loaded = (asyncio.Event() for _ in range(4))
    begin, load = AIOKafkaProducer.send_offsets_to_transaction, recovery._load  # pyright: ignore[reportPrivateUsage]
    seen = {"transactions": 0, "loads": 0}

    async def sleep_once(self: AIOKafkaProducer, offsets: Any, group: str) -> None:
        seen["transactions"] += group.endswith("trainer.run")
        if group.endswith("trainer.run") and seen["transactions"] == TRANSACTION:
            asleep.set()
            await woken.wait()
            raise KafkaConnectionError("the network was away")
        await begin(self, offsets, group)

    async def load_slowly(*arguments: Any) -> Any:
        seen["loads"] += 1
        if seen["loads"] == LOADS:
            loading.set()
            await loaded.wait()
        return await load(*arguments)

    monkeypatch.setattr(AIOKafkaProducer, "send_offsets_to_transaction", sleep_once)
    monkeypatch.setattr(recovery, "_load", load_slowly)
    settings = settings_of(kafka_settings, tmp_path, steps=2)
    async with World(kafka_settings).running(), asyncio.timeout(120):
        first = asyncio.create_task(serve(settings, asyncio.Event()))
        await asleep.wait()
        second = asyncio.create_task(serve(settings, asyncio.Event()))
        await loading.wait()
        woken.set()
        with pytest.raises(Fenced, match="another process committed"):
            await first
        loaded.set()
        await second

    events = await training_events(kafka_settings, "run")
    steps = [(event.step, event.version_out) for event in events if isinstance(event, TrainingStep)]
    assert steps == [(1, 2), (2, 3)]
    assert sum(isinstance(event, RunFinished) for event in events) == 1
    assert sorted(folder.name for folder in (settings.trainer.output / "run").glob("v*")) == [
        "v000001",
        "v000002",
        "v000003",
    ]
    assert all_once(events)

"""A trainer that sleeps in the middle of its transaction and wakes up while its successor still loads the model."""

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
    trainer = TrainerSettings(
        run_id="run",
        model=build_model(tmp_path / "model", seed=3),
        output=tmp_path / "policy",
        tasks="tests.streams.trainer_world:bandit",
        steps=2,
        groups_per_step=2,
        group_size=2,
        zero_variance="keep",
    )
    settings = Settings(kafka=kafka_settings, trainer=trainer)
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
    assert sorted(folder.name for folder in (trainer.output / "run").glob("v*")) == ["v000001", "v000002", "v000003"]
    assert all_once(events)

"""A run's steps in TensorBoard and W&B: all of them, each once, however often the tracker was started."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fulgurite.consumers.tracking import main, track
from fulgurite.consumers.tracking.service import Tracker
from fulgurite.consumers.tracking.writers import TensorBoard, WeightsAndBiases
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingEvent, TrainingStep
from tests.consumers.poison import poison


def started(run_id: str) -> RunStarted:
    return RunStarted(run_id=run_id, resource="policy", version=1, config={"steps": 3})


def step(run_id: str, number: int) -> TrainingStep:
    return TrainingStep(
        run_id=run_id,
        step=number,
        resource="policy",
        version_in=number,
        version_out=number + 1,
        reward_mean=number / 10,
        metrics={"actor/entropy": 1.0 / number},
    )


def finished(run_id: str) -> RunFinished:
    return RunFinished(run_id=run_id, step=3, resource="policy", version=4)


async def publish(settings: KafkaSettings, *events: TrainingEvent | bytes) -> None:
    async with AIOKafkaProducer(**connection_options(settings), acks="all") as producer:
        for event in events:
            value = event if isinstance(event, bytes) else encode(event)
            key = b"first" if isinstance(event, bytes) else encode_key(event.run_id)
            await producer.send_and_wait(settings.topic(TRAINING), value, key)


async def tracked(settings: KafkaSettings, folder: Path, seconds: float = 30.0) -> None:
    writer = TensorBoard(folder, "first")
    try:
        async with asyncio.timeout(seconds):
            await track(settings, "first", [writer], asyncio.Event())
    finally:
        writer.close()


def points(folder: Path, tag: str) -> list[Any]:
    found: Any = EventAccumulator(str(folder / "first"))
    found.Reload()
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]


async def test_a_runs_steps_are_written_also_by_a_second_life(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    others = [started("other"), step("other", 1), finished("other")]
    await publish(kafka_settings, *others, started("first"), step("first", 1), b"{}", step("first", 2))
    with pytest.raises(TimeoutError):
        await tracked(kafka_settings, tmp_path, seconds=3.0)  # the run is not over: it waits
    assert points(tmp_path, "reward") == [(1, 0.1), (2, 0.2)]
    await poison(kafka_settings, TRAINING, encode(step("first", 9)), b"first")
    await publish(kafka_settings, step("first", 3), finished("first"))
    await tracked(kafka_settings, tmp_path)
    assert points(tmp_path, "reward") == [(1, 0.1), (2, 0.2), (3, 0.3)], "not doubled"
    assert points(tmp_path, "actor/entropy") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert points(tmp_path, "training/version") == [(1, 2.0), (2, 3.0), (3, 4.0)]


def test_what_is_read_again_is_not_written_again() -> None:
    written: list[int] = []

    class Noted:
        def begin(self, event: RunStarted) -> None:
            written.append(0)

        def write(self, event: TrainingStep) -> None:
            written.append(event.step)

        def close(self) -> None: ...

    tracker = Tracker("first", [Noted()])
    for event in (started("first"), step("first", 1), step("other", 2), step("first", 2), step("first", 1)):
        tracker.take(encode_key(event.run_id), encode(event))
    assert written == [0, 1, 2]
    tracker.take(b"first", encode(finished("first")))
    assert tracker.is_over


def test_nothing_to_write_to_is_refused() -> None:
    with pytest.raises(SettingsError, match="--tensorboard, or a project with --wandb"):
        main(Settings(), "first", None, None)


def test_weights_and_biases_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real package, where it is installed: it brings a program that is not for every machine."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    writer = WeightsAndBiases("project", "first")
    tracker = Tracker("first", [writer])
    for event in (started("first"), step("first", 1), step("first", 2)):
        tracker.take(b"first", encode(event))
    writer.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert b"actor/entropy" in content
    assert b"training/version" in content

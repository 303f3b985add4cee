"""Partitions that are added to `trajectories` while runs are live: read from their beginning, exactly once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings, Settings, SourceSettings, TrainerSettings
from fulgurite.schemas.topics import TRAJECTORIES
from fulgurite.schemas.training import RunFinished, TrainingStep
from fulgurite.streams.trainer import reader, serve
from fulgurite.streams.trainer.log import partitions_of
from tests.streams.test_trainer_kills import settings_of, weights
from tests.streams.trainer_world import World, all_once, build_model, load_one_at_a_time, training_events


@pytest.fixture(autouse=True)
def one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    load_one_at_a_time(monkeypatch)


async def add_partitions(kafka: KafkaSettings, count: int) -> None:
    """Until the broker has `count`, and says so."""
    topic = kafka.topic(TRAJECTORIES)
    admin = AIOKafkaAdminClient(**connection_options(kafka))
    await admin.start()
    await admin.create_partitions({topic: NewPartitions(count)})
    await admin.close()
    while True:
        if len(await partitions_of(kafka, topic)) == count:
            return
        await asyncio.sleep(0.05)


async def steps_of(kafka: KafkaSettings, run_id: str) -> list[TrainingStep]:
    return [event for event in await training_events(kafka, run_id) if isinstance(event, TrainingStep)]


async def until_step(kafka: KafkaSettings, run_id: str, step: int, running: asyncio.Task[None]) -> None:
    async with asyncio.timeout(40):
        while len(await steps_of(kafka, run_id)) < step:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.1)


async def test_a_run_and_its_shadow_go_on_and_so_they_do_after_a_restart(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shadow hears of the partitions from the ledger alone, its own client looks too seldom."""
    model = build_model(tmp_path / "model", seed=3)
    trainer = settings_of(kafka_settings, model, tmp_path, "live").trainer.model_copy(
        update={"steps": 8, "keep_versions": 9, "group_deadline_seconds": 2.0}
    )
    live = Settings(kafka=kafka_settings, trainer=trainer)
    shadow = Settings(
        kafka=kafka_settings,
        trainer=TrainerSettings(run_id="shadow", resource="shadow", output=tmp_path),
        source=SourceSettings(run_id="live"),
    )
    stop = asyncio.Event()
    async with World(kafka_settings).running() as world:
        monkeypatch.setattr(reader, "PARTITIONS_SECONDS", 0.5)
        running = asyncio.create_task(serve(live, stop))
        await until_step(kafka_settings, "live", 1, running)
        monkeypatch.setattr(reader, "PARTITIONS_SECONDS", 600.0)
        shadowing = asyncio.create_task(serve(shadow, asyncio.Event()))
        await until_step(kafka_settings, "shadow", 1, shadowing)
        await add_partitions(kafka_settings, 4)
        await world.uses_partitions(4)
        await until_step(kafka_settings, "live", 6, running)
        stop.set()
        await running
        async with asyncio.timeout(40):
            await serve(live, asyncio.Event())
            await shadowing
    for run_id in ("live", "shadow"):
        events = await training_events(kafka_settings, run_id)
        assert isinstance(events[-1], RunFinished)
        steps = [event for event in events if isinstance(event, TrainingStep)]
        assert [step.step for step in steps] == list(range(1, 9))
        fates = all_once(events)
        assert set(fates) == set(world.queued)
        assert set(fates.values()) <= {"trained", "zero_variance"}, "nothing was taken for missing"
        assert steps[0].offsets.keys() == {"0", "1"}
        assert all(steps[-1].offsets[number] > 0 for number in ("0", "1", "2", "3"))
    assert weights(shadow) == weights(live), "not the same bits"


async def next_values(trajectories: reader.TrajectoryReader) -> list[bytes | None]:
    async with asyncio.timeout(20):
        while not (found := await trajectories.poll(0.1)):
            pass
    return [record.value for record in found]


async def test_nothing_is_over_while_it_may_lie_in_a_partition_that_was_just_added(
    kafka_settings: KafkaSettings,
) -> None:
    """The deadline of a group asks this; the client's own look comes too late for it."""
    topic = kafka_settings.topic(TRAJECTORIES)
    trajectories = reader.TrajectoryReader(kafka_settings, topic)
    await trajectories.start()
    await trajectories.seek_to_end()
    assert await trajectories.caught_up()
    assert trajectories.offsets.keys() == {0, 1}
    await add_partitions(kafka_settings, 3)
    async with AIOKafkaProducer(**connection_options(kafka_settings)) as producer:
        await producer.send_and_wait(topic, b"late", partition=2)
    assert not await trajectories.caught_up()
    assert await next_values(trajectories) == [b"late"]
    assert trajectories.offsets == {0: 0, 1: 0, 2: 1}
    assert await trajectories.caught_up()
    await trajectories.close()


async def test_where_an_earlier_life_stood_in_a_partition_counts_also_when_it_is_found_late(
    kafka_settings: KafkaSettings,
) -> None:
    """A broker may name it to one life and, with older metadata, not to the next."""
    topic = kafka_settings.topic(TRAJECTORIES)
    trajectories = reader.TrajectoryReader(kafka_settings, topic)
    await trajectories.start()
    await trajectories.seek({0: 0, 1: 0, 2: 1})
    await add_partitions(kafka_settings, 3)
    async with AIOKafkaProducer(**connection_options(kafka_settings)) as producer:
        for value in (b"first", b"second"):
            await producer.send_and_wait(topic, value, partition=2)
    assert not await trajectories.caught_up()
    assert await next_values(trajectories) == [b"second"]
    await trajectories.close()

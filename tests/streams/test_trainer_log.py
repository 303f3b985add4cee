"""What the log says of a run is final, whoever else is writing to it."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.codec import encode
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import RunStarted, TrainingStep
from fulgurite.streams.trainer.log import committed_run


@pytest.mark.parametrize("commits", [True, False])
async def test_another_ones_open_transaction_hides_no_version(kafka_settings: KafkaSettings, commits: bool) -> None:
    """Its record lies before ours: a version taken for one that nobody was told of would be removed."""
    topic = kafka_settings.topic(TRAINING)
    ours, other = (
        AIOKafkaProducer(**connection_options(kafka_settings), transactional_id=f"{topic}.{name}") for name in "ab"
    )
    await ours.start()
    await other.start()
    try:
        async with ours.transaction():
            started = RunStarted(run_id="run", resource="p", version=1)
            await ours.send_and_wait(topic, encode(started), b"run", partition=0)
        await other.begin_transaction()
        await other.send_and_wait(topic, b"{}", b"other", partition=0)
        async with ours.transaction():
            step = TrainingStep(run_id="run", step=1, resource="p", version_in=1, version_out=2)
            await ours.send_and_wait(topic, encode(step), b"run", partition=0)
        asking = asyncio.create_task(committed_run(kafka_settings, "run"))
        await asyncio.sleep(1.0)
        assert not asking.done()
        await (other.commit_transaction() if commits else other.abort_transaction())
        found = await asyncio.wait_for(asking, 20)
        assert found
        assert (found.version, found.step) == (2, 1)
    finally:
        await ours.stop()
        await other.stop()

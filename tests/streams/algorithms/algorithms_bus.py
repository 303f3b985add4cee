"""What tests of algorithms share: trajectories as the assembler writes them, and an algorithm at work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaProducer

from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.settings import AlgorithmSettings, KafkaSettings, Settings
from fulgurite.schemas.topics import TRAINING, Topic
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.definition import Algorithm
from fulgurite.streams.algorithms.memory import Start
from fulgurite.streams.algorithms.service import serve
from tests.streams.trainer_world import read_topic


def trajectory(rollout_id: str, **fields: Any) -> Trajectory:
    values: dict[str, Any] = {"reward": 1.0, **fields}
    return Trajectory(rollout_id=rollout_id, status="succeeded", **values)


async def send(kafka: KafkaSettings, topic: Topic, *events: Any) -> None:
    """Acknowledged, in this order."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for event in events:
            if isinstance(event, bytes):
                await producer.send_and_wait(kafka.topic(topic), event, b"k")
            else:
                names = ("run_id",) if topic is TRAINING else ("group_id", "rollout_id", "resource")
                key = next(filter(None, (getattr(event, name, "") for name in names)))
                await producer.send_and_wait(kafka.topic(topic), encode(event), encode_key(key))
    finally:
        await producer.stop()


@asynccontextmanager
async def at_work(
    kafka: KafkaSettings,
    algorithm: Algorithm,
    start: str = "beginning",
    hook: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> AsyncGenerator[asyncio.Task[None]]:
    stop = asyncio.Event()
    algorithm_settings = AlgorithmSettings(**settings)
    task = asyncio.create_task(
        serve(Settings(kafka=kafka, algorithm=algorithm_settings), algorithm, Start.parse(start), stop, hook)
    )
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait({task}, timeout=10)
        if task.done() and not task.cancelled() and task.exception() is None:
            task.result()


async def until(kafka: KafkaSettings, topic: Topic, count: int, seconds: float = 30.0) -> list[Any]:
    """The committed records of a topic, as soon as there are so many."""
    async with asyncio.timeout(seconds):
        while True:
            found = await read_topic(kafka, topic)
            if len(found) >= count:
                return found
            await asyncio.sleep(0.1)

"""What somebody committed is read by whoever begins, also while another one's transaction lies open before it: one that
was killed leaves it so until its time-out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from fulgurite.producers.kafka import connection_options
from fulgurite.producers.prompts import CANDIDATE_OF, PromptTemplates
from fulgurite.producers.resources import newest_version
from fulgurite.schemas.algorithms import AlgorithmState
from fulgurite.schemas.codec import encode
from fulgurite.schemas.resources import ResourceVersion, prompt_version
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import ALGORITHM_STATE, RESOURCES, SPANS, Topic
from fulgurite.streams.algorithms.memory import remembered
from fulgurite.streams.algorithms.prompts.reading import spans_of
from fulgurite.streams.trainer.ownership import Ownership

WEIGHTS = ResourceVersion(resource="policy", version=5, uri="file:///x", sha256="0" * 64, run_id="other")
CANDIDATE = prompt_version("support.c1", 7, "Answer.", metadata={CANDIDATE_OF: "support"})
GROUP = AlgorithmState(algorithm="own", name="group", value={"members": [[0, 0]]})
SPAN = Span(rollout_id="run-r", attempt_id="a", span_id="s", name="said", start_ns=1, end_ns=2)


async def remembered_group(kafka: KafkaSettings) -> Any:
    return await remembered(kafka, "own")


async def newest_number(kafka: KafkaSettings) -> Any:
    found = await newest_version(kafka, "policy")
    return found and found.version


async def number_taken_over(kafka: KafkaSettings) -> Any:
    return await Ownership(kafka, "policy", "new").take_over()


async def text_of_pinned(kafka: KafkaSettings) -> Any:
    prompts = PromptTemplates(kafka)
    try:
        return (await prompts.get("support", "support.c1@7")).text
    finally:
        await prompts.close()


async def names_of_spans(kafka: KafkaSettings) -> Any:
    found = await spans_of(kafka, {0: 0}, {"run-r": "a"}, "run")
    return [span.name for span in found.get("run-r", [])]


@pytest.mark.parametrize(
    ("read", "topic", "record", "expected"),
    [
        (remembered_group, ALGORITHM_STATE, GROUP, {"group": GROUP.value}),
        (newest_number, RESOURCES, WEIGHTS, 5),
        (number_taken_over, RESOURCES, WEIGHTS, 5),
        (text_of_pinned, RESOURCES, CANDIDATE, "Answer."),
        (names_of_spans, SPANS, SPAN, ["said"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_it_is_waited_for(
    kafka_settings: KafkaSettings,
    read: Callable[[KafkaSettings], Awaitable[Any]],
    topic: Topic,
    record: Any,
    expected: Any,
) -> None:
    name = kafka_settings.topic(topic)
    options = connection_options(kafka_settings)
    ours = AIOKafkaProducer(**options)
    other = AIOKafkaProducer(**options, transactional_id=f"{name}.other")
    await ours.start()
    await other.start()
    try:
        await other.begin_transaction()
        await other.send_and_wait(name, b"{}", b"other", partition=0)
        key = record.key if isinstance(record, AlgorithmState) else getattr(record, "resource", None)
        await ours.send_and_wait(name, encode(record), key.encode() if key else None, partition=0)
        reading = asyncio.ensure_future(read(kafka_settings))
        await asyncio.sleep(0.8)
        assert not reading.done()
        await other.abort_transaction()
        assert await asyncio.wait_for(reading, 20) == expected
    finally:
        await ours.stop()
        await other.stop()

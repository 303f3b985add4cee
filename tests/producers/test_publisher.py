"""The asynchronous publisher against the real broker."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.partitioner import murmur2

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.publisher import Acknowledgement, Publisher
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import HEADER_MESSAGE, HEADER_REASON, DeadLetter
from fulgurite.schemas.errors import BufferFull, RecordTooLarge, Undelivered
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import DEAD_LETTERS, REWARDS, SPANS
from tests.producers.reading import read_topic


def a_span(number: int, rollout_id: str = "r1", text: str = "") -> Span:
    return Span(
        rollout_id=rollout_id, span_id=f"s{number}", name="step", start_ns=now_ns(), end_ns=now_ns(), input=text
    )


async def test_records_of_a_key_keep_their_order_and_lie_where_murmur2_says(kafka_settings: KafkaSettings) -> None:
    async with Publisher(kafka_settings) as publisher:
        for number in range(300):
            await publisher.publish_span(a_span(number, f"r{number % 3}"))
        await publisher.flush()
        assert (publisher.delivered, publisher.failed, publisher.waiting) == (300, 0, 0)
    records = await read_topic(kafka_settings, SPANS)
    for rollout in ("r0", "r1", "r2"):
        mine = [record for record in records if record.key == rollout.encode()]
        assert {record.partition for record in mine} == {(murmur2(rollout.encode()) & 0x7FFFFFFF) % 2}
        numbers = [int(decode(Span, record.value).span_id[1:]) for record in mine]
        assert numbers == [number for number in range(300) if f"r{number % 3}" == rollout]


async def test_an_acknowledgement_names_the_place_in_the_log(kafka_settings: KafkaSettings) -> None:
    async with Publisher(kafka_settings) as publisher:
        acknowledgement = await publisher.publish_reward(Reward(rollout_id="r1", value=0.5))
        placed = await acknowledgement
    (record,) = await read_topic(kafka_settings, REWARDS)
    assert (record.partition, record.offset) == (placed.partition, placed.offset)
    assert json.loads(record.value or b"")["value"] == 0.5


async def test_what_is_too_large_is_refused_before_it_is_sent(kafka_settings: KafkaSettings) -> None:
    small = kafka_settings.model_copy(update={"max_record_bytes": 2_048})
    async with Publisher(small) as publisher:
        with pytest.raises(RecordTooLarge, match=r"bytes as JSON.*max_record_bytes.*2048"):
            await publisher.publish_span(a_span(1, text="x" * 3_000))
        with pytest.raises(RecordTooLarge, match=r"with key and headers.*2048"):
            await publisher.publish_bytes(SPANS, b"k" * 1_000, b"v" * 1_000, [("h", b"x" * 100)])
        assert publisher.waiting + publisher.delivered + publisher.failed == 0
        await publisher.publish_bytes(SPANS, b"k", b"v" * 2_000)
    assert len(await read_topic(kafka_settings, SPANS)) == 1


async def test_the_largest_record_allowed_is_taken_by_the_broker(kafka_settings: KafkaSettings) -> None:
    async with Publisher(kafka_settings, ProducerSettings(compression="none")) as publisher:
        await (await publisher.publish_bytes(SPANS, b"", b"v" * kafka_settings.max_record_bytes))


async def test_a_dead_letter_keeps_bytes_and_reason_and_is_cut_when_it_does_not_fit(
    kafka_settings: KafkaSettings,
) -> None:
    small = kafka_settings.model_copy(update={"max_record_bytes": 2_048})
    letters = [
        DeadLetter("t", 1, 7, "test", "not_json", "the message", b"key", b"\xff\x00"),
        DeadLetter("t", 1, 8, "test", "too_large", "the message", b"key", b"x" * 5_000),
    ]
    async with Publisher(small) as publisher:
        for dead in letters:
            await publisher.publish_dead_letter(dead)
    first, second = await read_topic(kafka_settings, DEAD_LETTERS)
    assert (first.key, first.value) == (b"key", b"\xff\x00")
    assert dict(first.headers)[HEADER_REASON] == b"not_json"
    assert dict(first.headers)[HEADER_MESSAGE] == b"the message"
    assert 1_000 < len(second.value or b"") < 2_048
    assert dict(second.headers)["fulgurite.truncated_from_bytes"] == b"5000"


async def test_a_topic_that_does_not_exist_is_named(kafka_settings: KafkaSettings) -> None:
    elsewhere = kafka_settings.model_copy(update={"topic_prefix": "nowhere."})
    async with Publisher(elsewhere, ProducerSettings(buffer_wait_seconds=0.5)) as publisher:
        with pytest.raises(BufferFull, match=r"does not know topic nowhere\.spans"):
            await publisher.publish_span(a_span(1))
        assert publisher.waiting == 0


async def test_a_refused_batch_fails_and_what_comes_after_is_delivered(kafka_settings: KafkaSettings) -> None:
    """The broker refuses a batch that the topic's own bound forbids; aiokafka's producer id is useless after that."""
    strict = kafka_settings.model_copy(update={"topic_prefix": f"{kafka_settings.topic_prefix}strict."})
    admin = AIOKafkaAdminClient(**connection_options(kafka_settings))
    await admin.start()
    topic = NewTopic(strict.topic(SPANS), 1, 1, topic_configs={"max.message.bytes": "20000"})
    await admin.create_topics([topic])
    publisher = Publisher(strict, ProducerSettings(compression="none"))
    await publisher.start()
    try:
        await (await publisher.publish_bytes(SPANS, b"k", b"before"))
        refused = await publisher.publish_bytes(SPANS, b"k", b"x" * 50_000)
        with pytest.raises(Undelivered, match="MessageSizeTooLarge"):
            await refused
        for number in range(20):
            await (await publisher.publish_bytes(SPANS, b"k", f"after {number}".encode()))
        with pytest.raises(Undelivered, match="1 records"):
            await publisher.flush()
        await publisher.flush()  # reported once
        assert (publisher.delivered, publisher.failed) == (21, 1)
    finally:
        await publisher.close()
        await admin.delete_topics([strict.topic(SPANS)])
        await admin.close()


async def test_without_a_broker_start_waits_and_can_be_given_up() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        kafka = KafkaSettings(bootstrap_servers=f"127.0.0.1:{reserved.getsockname()[1]}")
        publisher = Publisher(kafka)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(publisher.start(), 0.5)
        await publisher.close()


@pytest.mark.chaos
@pytest.mark.slow
async def test_a_broker_killed_under_load_loses_nothing_acknowledged_and_hides_nothing(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path) as server:
        kafka = KafkaSettings(bootstrap_servers=server.bootstrap_servers, partitions=2)
        await create_topics(kafka)
        publisher = Publisher(kafka, ProducerSettings(buffer_records=500, buffer_wait_seconds=1.0))
        await publisher.start()
        accepted: dict[str, Acknowledgement] = {}
        refused = 0
        stop = asyncio.Event()

        async def load(rollout: str) -> int:
            full, number = 0, 0
            while not stop.is_set():
                span = a_span(number, rollout)
                try:
                    accepted[f"{rollout}/{number}"] = await publisher.publish_span(span)
                    number += 1
                except BufferFull:
                    full += 1
                await asyncio.sleep(0.001)
            return full

        loads = [asyncio.create_task(load(f"r{number}")) for number in range(4)]
        await asyncio.sleep(0.5)
        server.kill()
        await asyncio.sleep(3.0)  # the buffer fills, publish raises BufferFull
        await asyncio.to_thread(server.start)
        await asyncio.sleep(1.0)
        stop.set()
        refused = sum(await asyncio.gather(*loads))
        await publisher.flush()
        assert len(accepted) == publisher.delivered + publisher.failed
        assert publisher.failed == 0  # the broker came back in time
        assert refused > 0
        await publisher.close()

        for rollout in ("r0", "r1", "r2", "r3"):
            records = [record for record in await read_topic(kafka, SPANS) if record.key == rollout.encode()]
            stored = [f"{rollout}/{decode(Span, record.value).span_id[1:]}" for record in records]
            sent = [name for name in accepted if name.startswith(f"{rollout}/")]
            assert stored == sent  # all of them, once, in order


@pytest.mark.chaos
@pytest.mark.slow
async def test_what_the_broker_never_acknowledged_is_reported_at_close(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path) as server:
        kafka = KafkaSettings(bootstrap_servers=server.bootstrap_servers, partitions=2)
        await create_topics(kafka)
        producer = ProducerSettings(buffer_records=10, buffer_wait_seconds=0.5, delivery_seconds=1.0)
        publisher = Publisher(kafka, producer)
        await publisher.start()
        await (await publisher.publish_span(a_span(0)))
        server.kill()
        waiting = [await publisher.publish_span(a_span(number)) for number in range(10)]
        with pytest.raises(BufferFull, match=r"10 of producer\.buffer_records = 10 wait"):
            await publisher.publish_span(a_span(11))
        with pytest.raises(Undelivered, match="10 records"):
            await publisher.flush()
        with pytest.raises(Undelivered, match="10 records") as raised:
            await publisher.close()
        assert raised.value.records == 10
        assert (publisher.delivered, publisher.failed, publisher.waiting) == (1, 10, 0)
        for acknowledgement in waiting:
            with pytest.raises(Undelivered):
                await acknowledgement

"""Reading topics back in tests."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import Topic


async def read_topic(kafka: KafkaSettings, topic: Topic) -> list[ConsumerRecord[bytes, bytes]]:
    """Everything a topic holds now, partition after partition."""
    consumer = AIOKafkaConsumer(
        kafka.topic(topic), **connection_options(kafka), enable_auto_commit=False, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        partitions = sorted(consumer.assignment())
        ends = await consumer.end_offsets(partitions)
        records: dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]] = {one: [] for one in partitions}
        while any([await consumer.position(one) < ends[one] for one in partitions]):
            for one, some in (await consumer.getmany(timeout_ms=200)).items():
                records[one] += some
        return [record for one in partitions for record in records[one]]
    finally:
        await consumer.stop()

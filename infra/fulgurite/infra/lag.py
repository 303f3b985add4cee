"""How far consumer groups are behind the ends of our topics."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer

from fulgurite.infra.topics import connected_admin
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import TOPICS


async def consumer_lag(settings: KafkaSettings) -> dict[str, dict[str, int]]:
    """Group -> topic -> records not yet committed, for every group that committed offsets on topics of ours."""
    ours = {settings.topic(topic) for topic in TOPICS}
    admin = await connected_admin(settings)
    try:
        groups = sorted(str(group[0]) for group in await admin.list_consumer_groups())
        committed = {group: await admin.list_consumer_group_offsets(group) for group in groups}
    finally:
        await admin.close()
    parts = sorted({part for offsets in committed.values() for part in offsets if part.topic in ours})
    if not parts:
        return {}
    consumer = AIOKafkaConsumer(**connection_options(settings))
    await consumer.start()
    try:
        end = await consumer.end_offsets(parts)
    finally:
        await consumer.stop()
    lag: dict[str, dict[str, int]] = {}
    for group, offsets in committed.items():
        for part, position in offsets.items():
            if part.topic in ours and position.offset >= 0:
                topics = lag.setdefault(group, {})
                topics[part.topic] = topics.get(part.topic, 0) + max(0, end[part] - position.offset)
    return lag

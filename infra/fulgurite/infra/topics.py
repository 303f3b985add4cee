"""Creates the topics of fulgurite.schemas.topics on a broker, and tells what is there.

Idempotent: a topic that exists as declared is left alone. A topic with another number of partitions is an error that
nobody can mend silently, because keys would move to other partitions.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, NoError, TopicAlreadyExistsError, for_code

from fulgurite.infra.kafka_config import BATCH_OVERHEAD_BYTES
from fulgurite.producers.credentials import connection_problem
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import TOPICS, Topic

_REQUEST_MS = 30_000
CONNECT_SECONDS = 15.0
"""For something that takes connections and says nothing."""


@dataclass(frozen=True, slots=True)
class TopicState:
    """One declared topic as the broker has it."""

    topic: Topic
    name: str
    partitions: int
    """0: it does not exist."""
    records: int
    """End offsets minus beginning offsets: an upper bound where transactions or compaction leave gaps."""


async def create_topics(settings: KafkaSettings) -> list[str]:
    """Creates what is missing; gives the names it created.

    Raises SettingsError when a topic exists with other partitions, or the broker refuses one; StartError when no broker
    answers.
    """
    admin = await connected_admin(settings)
    try:
        existing = await _partitions(admin)
        _check_partitions(settings, existing)
        missing = [topic for topic in TOPICS if settings.topic(topic) not in existing]
        if missing:
            response = await admin.create_topics([_new_topic(settings, topic) for topic in missing], _REQUEST_MS)
            created = _created(settings, response.to_object()["topic_errors"])
            await _until_visible(settings, admin)
            return created
        return []
    finally:
        await admin.close()


async def delete_topics(settings: KafkaSettings) -> None:
    """Deletes the prefixed topics of these settings with all they hold; one without the prefix (otlp_spans) stays."""
    admin = await connected_admin(settings)
    try:
        existing = await _partitions(admin)
        ours = [name for name in map(settings.topic, TOPICS) if name.startswith(settings.topic_prefix)]
        names = [name for name in ours if name in existing]
        if names:
            await admin.delete_topics(names, _REQUEST_MS)
    finally:
        await admin.close()


async def topic_states(settings: KafkaSettings) -> list[TopicState]:
    """Every declared topic with its partitions and records, in the order of their declaration."""
    admin = await connected_admin(settings)
    try:
        existing = await _partitions(admin)
    finally:
        await admin.close()
    consumer = AIOKafkaConsumer(**connection_options(settings))
    await consumer.start()
    try:
        names = [settings.topic(topic) for topic in TOPICS]
        parts = [TopicPartition(name, number) for name in names for number in range(existing.get(name, 0))]
        begin, end = (await consumer.beginning_offsets(parts), await consumer.end_offsets(parts)) if parts else ({}, {})
    finally:
        await consumer.stop()
    return [
        TopicState(
            topic,
            name,
            existing.get(name, 0),
            sum(end[part] - begin[part] for part in parts if part.topic == name),
        )
        for topic, name in zip(TOPICS, names, strict=True)
    ]


async def partitions_of(settings: KafkaSettings, topic: Topic) -> int:
    """How many partitions one topic has. Raises StartError where there is no such topic or no broker."""
    admin = await connected_admin(settings)
    try:
        count = (await _partitions(admin)).get(settings.topic(topic), 0)
    finally:
        await admin.close()
    if not count:
        raise StartError(f"the topic {settings.topic(topic)} does not exist: fulgurite topics create")
    return count


def _new_topic(settings: KafkaSettings, topic: Topic) -> NewTopic:
    configs = {
        "cleanup.policy": topic.cleanup,
        "retention.ms": str(topic.retention_ms),
        "max.message.bytes": str(settings.max_record_bytes + BATCH_OVERHEAD_BYTES),
        "min.insync.replicas": str(settings.min_insync_replicas),
        "message.timestamp.type": "LogAppendTime" if topic.log_append_time else "CreateTime",
    }
    return NewTopic(
        settings.topic(topic), _wanted_partitions(settings, topic), settings.replication_factor, topic_configs=configs
    )


def _wanted_partitions(settings: KafkaSettings, topic: Topic) -> int:
    return topic.partitions or settings.partitions


def _check_partitions(settings: KafkaSettings, existing: dict[str, int]) -> None:
    wrong = [
        f"{settings.topic(topic)} has {existing[settings.topic(topic)]}, wanted {_wanted_partitions(settings, topic)}"
        for topic in TOPICS
        # The unprefixed topic belongs to another product and may be shared by several namespaces.
        if topic.prefixed
        and existing.get(settings.topic(topic), _wanted_partitions(settings, topic))
        != _wanted_partitions(settings, topic)
    ]
    if wrong:
        raise SettingsError(
            "topics exist with another number of partitions: " + "; ".join(wrong) + ". Set kafka.partitions to what is "
            "there, or choose another kafka.topic_prefix: keys cannot move between partitions of a topic in use"
        )


def _created(settings: KafkaSettings, answers: list[dict[str, Any]]) -> list[str]:
    created: list[str] = []
    refused: list[str] = []
    for answer in answers:
        error = for_code(answer["error_code"])
        if error is NoError:
            created.append(answer["topic"])
        elif error is not TopicAlreadyExistsError:  # somebody else was creating it at the same moment
            refused.append(f"{answer['topic']}: {answer.get('error_message') or error.__name__}")
    if refused:
        raise SettingsError(f"the broker {settings.bootstrap_servers} refused topics: " + "; ".join(refused))
    return created


async def _until_visible(settings: KafkaSettings, admin: AIOKafkaAdminClient) -> None:
    """The controller answers before brokers and their clients can see a new topic: wait until every leader is known."""
    wanted = {settings.topic(topic) for topic in TOPICS}
    deadline = time.monotonic() + _REQUEST_MS / 1_000
    while not wanted <= (await _partitions(admin)).keys():
        if time.monotonic() > deadline:
            raise StartError(
                f"{settings.bootstrap_servers}: topics were created but have no leader: is the broker ill?"
            )
        await asyncio.sleep(0.02)


async def connected_admin(settings: KafkaSettings) -> AIOKafkaAdminClient:
    """To be closed by the caller. Raises StartError when no broker answers, SettingsError when they refuse us."""
    admin = AIOKafkaAdminClient(**connection_options(settings), request_timeout_ms=_REQUEST_MS)
    try:
        await asyncio.wait_for(admin.start(), CONNECT_SECONDS)
    except (KafkaConnectionError, TimeoutError) as error:
        await admin.close()
        problem = await connection_problem(settings)
        if problem is not None and problem.refused:
            raise SettingsError(problem.text) from error
        raise StartError(
            f"no Kafka broker answers at {settings.bootstrap_servers} (kafka.bootstrap_servers, "
            f"{settings.security_protocol}); `fulgurite up` starts one"
        ) from error
    return admin


async def _partitions(admin: AIOKafkaAdminClient) -> dict[str, int]:
    """How many partitions every topic on the broker has; without those whose leaders are not known yet."""
    return {
        str(item["topic"]): len(item["partitions"])
        for item in await admin.describe_topics()
        if item["error_code"] == 0
        and item["partitions"]
        and all(part["error_code"] == 0 for part in item["partitions"])
    }

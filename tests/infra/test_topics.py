"""Topics on the real broker."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from fulgurite.infra.topics import create_topics, topic_states
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import CO_PARTITIONED, RESOURCES, SPANS, TOPICS, TRAJECTORIES


async def test_all_topics_are_created_as_declared(kafka_settings: KafkaSettings) -> None:
    states = {state.topic.name: state for state in await topic_states(kafka_settings)}
    assert set(states) == {topic.name for topic in TOPICS}
    assert {states[topic.name].partitions for topic in CO_PARTITIONED} == {2}
    assert states[RESOURCES.name].partitions == 1
    assert all(state.records == 0 for state in states.values() if state.topic.prefixed)
    configs = await _configs(kafka_settings, kafka_settings.topic(TRAJECTORIES))
    assert configs["message.timestamp.type"] == "LogAppendTime"
    assert configs["cleanup.policy"] == "delete"
    assert configs["retention.ms"] == str(TRAJECTORIES.retention_ms)
    assert (await _configs(kafka_settings, kafka_settings.topic(RESOURCES)))["cleanup.policy"] == "compact"


async def test_creating_again_creates_nothing(kafka_settings: KafkaSettings) -> None:
    assert await create_topics(kafka_settings) == []


async def test_other_partitions_are_an_error_that_names_them(kafka_settings: KafkaSettings) -> None:
    wrong = kafka_settings.model_copy(update={"partitions": 3})
    with pytest.raises(SettingsError, match=r"spans has 2, wanted 3.*kafka\.partitions"):
        await create_topics(wrong)


async def test_too_many_copies_are_refused_with_the_brokers_reason(kafka_settings: KafkaSettings) -> None:
    wrong = kafka_settings.model_copy(update={"topic_prefix": "copies.", "replication_factor": 3})
    with pytest.raises(SettingsError, match=r"refused topics: copies\.rollouts"):
        await create_topics(wrong)


async def test_records_are_counted_and_the_largest_record_fits(kafka_settings: KafkaSettings) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka_settings.bootstrap_servers,
        acks="all",
        enable_idempotence=True,
        max_request_size=kafka_settings.max_record_bytes + 4_096,
    )
    await producer.start()
    try:
        await producer.send_and_wait(kafka_settings.topic(SPANS), b"x" * kafka_settings.max_record_bytes, key=b"k")
    finally:
        await producer.stop()
    states = {state.topic.name: state for state in await topic_states(kafka_settings)}
    assert states[SPANS.name].records == 1


async def test_no_broker_is_a_clear_error() -> None:
    with pytest.raises(StartError, match=r"no Kafka broker answers at 127\.0\.0\.1:1 "):
        await create_topics(KafkaSettings(bootstrap_servers="127.0.0.1:1"))


async def _configs(settings: KafkaSettings, topic: str) -> dict[str, str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    try:
        (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    finally:
        await admin.close()
    (resource,) = response.to_object()["resources"]
    return {entry["config_names"]: entry["config_value"] for entry in resource["config_entries"]}

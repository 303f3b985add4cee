"""Every way by which our producers send: what reaches Kafka is redacted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from fulgurite.producers.exporter import KafkaSpanExporter
from fulgurite.producers.outbox import Outbox
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.sync_publisher import SyncPublisher
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.redaction import KeyRule, RedactionSettings, ValueRule
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import DEAD_LETTERS, REWARDS, SPANS
from tests.producers.reading import read_topic

SECRET = "ann@example.org"
RULES = RedactionSettings(keys=[KeyRule(regex="(?i)password", action="drop")], values=[ValueRule(name="email")])


def a_span(number: int) -> Span:
    attributes: dict[str, Any] = {"password": "hunter2", "fulgurite.note": "kept"}
    return Span(
        rollout_id=f"r{number}",
        span_id="s",
        name="n",
        start_ns=1,
        end_ns=2,
        input=f"to {SECRET}",
        response_token_ids=[1],
        logprobs=[-0.5],
        attributes=attributes,
    )


async def test_what_reaches_kafka_is_redacted(kafka_settings: KafkaSettings) -> None:
    dead = DeadLetter("", -1, -1, stage="x", reason="y", message="z", key=None, value=SECRET.encode())
    async with Publisher(kafka_settings, redaction=RULES) as publisher:
        await publisher.publish_span(a_span(1))
        await publisher.publish_reward(Reward(rollout_id="r1", value=1.0, metadata={"by": SECRET}))
        await publisher.publish_dead_letter(dead)
        outbox = Outbox(publisher, kafka_settings.topic, kafka_settings.max_record_bytes, publisher.redactor)
        outbox.put(SPANS, "r2", a_span(2))
        await outbox.flush()
    records = await read_topic(kafka_settings, SPANS)
    for record in records:
        found = json.loads(record.value or b"")
        assert found["input"] == "to [redacted:email]"
        assert found["attributes"] == {"fulgurite.note": "kept"}
        assert (found["response_token_ids"], found["logprobs"]) == ([1], [-0.5])
    assert [json.loads(r.value or b"")["metadata"] for r in await read_topic(kafka_settings, REWARDS)] == [
        {"by": "[redacted:email]"}
    ]
    assert [r.value for r in await read_topic(kafka_settings, DEAD_LETTERS)] == [b"[redacted:email]"]


def test_what_threads_and_opentelemetry_send_is_redacted(kafka_settings: KafkaSettings) -> None:
    with SyncPublisher(kafka_settings, redaction=RULES) as publisher:
        publisher.publish_span(a_span(1)).result(30)
    provider = TracerProvider()
    exporter = KafkaSpanExporter(Settings(kafka=kafka_settings, redaction=RULES))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    tracer.start_span("n", attributes={"Password": "hunter2", "mail": SECRET, "input.value": SECRET}).end()
    # A span that cannot be one (a negative count) becomes a dead letter, redacted as well.
    bad = {"Password": "hunter2", "mail": SECRET, "gen_ai.usage.input_tokens": -1}
    tracer.start_span("bad", attributes=bad).end()
    provider.shutdown()

    found = [json.loads(r.value or b"") for r in asyncio.run(read_topic(kafka_settings, SPANS))]
    assert [span["input"] for span in found if span["rollout_id"]] == ["to [redacted:email]"]
    (exported,) = [span for span in found if not span["rollout_id"]]
    assert exported["input"] == "[redacted:email]"
    assert exported["attributes"] == {"mail": "[redacted:email]", "input.value": "[redacted:email]"}
    (dead,) = asyncio.run(read_topic(kafka_settings, DEAD_LETTERS))
    assert b"hunter2" not in (dead.value or b"")
    assert SECRET.encode() not in (dead.value or b"")
    assert b"[redacted:email]" in (dead.value or b"")


def test_fields_made_of_attributes_follow_the_rules_for_these(kafka_settings: KafkaSettings) -> None:
    keys = [
        KeyRule(name="gen_ai.input.messages", action="drop"),
        KeyRule(name="url.full", action="mask"),
        KeyRule(name="service.name", action="hash"),
        KeyRule(name="*tokens", action="drop"),
        KeyRule(name="gen_ai.response.finish_reasons", action="mask"),
    ]
    exporter = KafkaSpanExporter(Settings(kafka=kafka_settings, redaction=RedactionSettings(keys=keys)))
    provider = TracerProvider(resource=Resource({"service.name": "alice-laptop"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    attributes: dict[str, Any] = {
        "gen_ai.input.messages": "SECRET PROMPT",
        "url.full": "https://host/SECRETPATH",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.response.finish_reasons": ["stop"],
    }
    provider.get_tracer("test").start_span("n", attributes=attributes).end()
    provider.shutdown()
    (record,) = asyncio.run(read_topic(kafka_settings, SPANS))
    found = json.loads(record.value or b"")
    assert "input" not in found or found["input"] == ""
    assert (found["endpoint"], found["finish_reason"]) == ("[redacted]", "[redacted]")
    assert found["service"] == found["resource_attributes"]["service.name"]
    assert found["service"].startswith("sha256:")
    assert found["input_tokens"] == 12
    assert not any(secret in (record.value or b"") for secret in (b"SECRET", b"alice"))

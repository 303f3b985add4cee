"""The OpenTelemetry exporter: a real TracerProvider, the real broker."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from fulgurite.producers.exporter import KafkaSpanExporter, to_span
from fulgurite.producers.sync_publisher import SyncPublisher
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import HEADER_MESSAGE, HEADER_REASON, HEADER_STAGE
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import DEAD_LETTERS, SPANS
from tests.producers.reading import read_topic

IDS = {"agentlightning.rollout_id": "r1", "agentlightning.attempt_id": "a1", "service.name": "shop"}


class Keep(SpanExporter):
    """Holds what it is given."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: list[ReadableSpan]) -> SpanExportResult:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.spans += spans
        return SpanExportResult.SUCCESS


@pytest.fixture
def kept() -> Iterator[tuple[TracerProvider, Keep]]:
    keep = Keep()
    provider = TracerProvider(resource=Resource(IDS))
    provider.add_span_processor(SimpleSpanProcessor(keep))
    yield provider, keep
    provider.shutdown()


async def test_spans_of_a_provider_arrive_with_their_ids(kafka_settings: KafkaSettings) -> None:
    provider = TracerProvider(resource=Resource(IDS))
    provider.add_span_processor(BatchSpanProcessor(KafkaSpanExporter(Settings(kafka=kafka_settings))))
    tracer = provider.get_tracer("t")
    with tracer.start_as_current_span("outer") as outer:
        with tracer.start_as_current_span("inner", attributes={"agentlightning.span_sequence_id": 7}):
            pass
        with tracer.start_as_current_span("elsewhere", attributes={"agentlightning.rollout_id": "r2"}):
            pass
    assert provider.force_flush()
    provider.shutdown()
    records = await read_topic(kafka_settings, SPANS)
    spans = {span.name: span for span in (decode(Span, record.value) for record in records)}
    assert {name: span.rollout_id for name, span in spans.items()} == {"outer": "r1", "inner": "r1", "elsewhere": "r2"}
    assert spans["inner"].parent_span_id == spans["outer"].span_id == f"{outer.get_span_context().span_id:016x}"
    assert (spans["inner"].sequence_id, spans["inner"].attempt_id, spans["inner"].service) == (7, "a1", "shop")
    assert {record.key for record in records} == {b"r1", b"r2"}


def test_newer_and_older_names_become_the_same_fields(kept: tuple[TracerProvider, Keep]) -> None:
    provider, keep = kept
    tracer = provider.get_tracer("t")
    new = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "asked",
        "gen_ai.response.model": "served",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.agent.name": "buyer",
        "fulgurite.response_token_ids": [5, 6],
        "fulgurite.logprobs": [-0.5, -0.25],
        "fulgurite.weight_versions": json.dumps([{"version": 4, "start": 0, "end": 2}]),
    }
    old = {
        "openinference.span.kind": "LLM",
        "llm.model_name": "served",
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 2,
        "gen_ai.response.finish_reason": "stop",
        "gen_ai.agent.name": "buyer",
    }
    for attributes in (new, old):
        tracer.start_span("call", attributes=attributes, kind=SpanKind.CLIENT).end()
    first, second = (to_span(span) for span in keep.spans)
    for span in (first, second):
        assert (span.operation, span.model, span.finish_reason, span.agent) == ("chat", "served", "stop", "buyer")
        assert (span.input_tokens, span.output_tokens, span.kind) == (3, 2, "client")
    assert first.is_llm_call
    assert (first.response_token_ids, first.logprobs) == ([5, 6], [-0.5, -0.25])
    assert [part.version for part in first.weight_versions] == [4]
    assert "fulgurite.logprobs" not in first.attributes
    assert second.attributes["gen_ai.usage.prompt_tokens"] == 3


def test_times_status_events_and_links_are_kept(kept: tuple[TracerProvider, Keep]) -> None:
    provider, keep = kept
    tracer = provider.get_tracer("t")
    other = tracer.start_span("other")
    span = tracer.start_span("work", start_time=1_000, links=[Link(other.get_span_context(), {"why": "before"})])
    span.add_event("thought", {"n": 1}, timestamp=1_500)
    span.set_status(Status(StatusCode.ERROR, "no luck"))
    span.end(end_time=2_000)
    event = to_span(keep.spans[0])
    assert (event.start_ns, event.end_ns, event.status, event.status_message) == (1_000, 2_000, "error", "no luck")
    assert [(one.name, one.time_ns, one.attributes) for one in event.events] == [("thought", 1_500, {"n": 1})]
    assert event.links[0].span_id == f"{other.get_span_context().span_id:016x}"
    assert event.resource_attributes["service.name"] == "shop"


async def test_what_is_too_large_or_wrong_becomes_a_dead_letter_and_the_others_go_on(
    kafka_settings: KafkaSettings, kept: tuple[TracerProvider, Keep]
) -> None:
    provider, keep = kept
    tracer = provider.get_tracer("t")
    tracer.start_span("fine").end()
    tracer.start_span("huge", attributes={"text": "x" * 10_000}).end()
    tracer.start_span("wrong", attributes={"gen_ai.usage.input_tokens": "many"}).end()
    tracer.start_span("no json", attributes={"prompt_token_ids": "not json"}).end()
    tracer.start_span("no list", attributes={"fulgurite.logprobs": 5}).end()
    tracer.start_span("half", attributes={"text": "a\ud83d", "agentlightning.rollout_id": "r\ud83d"}).end()
    tracer.start_span("half too", attributes={"text": "a\ud83d"}).end()
    tracer.start_span("also fine").end()
    small = Settings(kafka=kafka_settings.model_copy(update={"max_record_bytes": 4_096}))
    exporter = KafkaSpanExporter(small)
    assert exporter.export(keep.spans) is SpanExportResult.SUCCESS
    exporter.shutdown()
    names = [decode(Span, record.value).name for record in await read_topic(kafka_settings, SPANS)]
    assert names == ["fine", "also fine"]
    headers = [dict(record.headers) for record in await read_topic(kafka_settings, DEAD_LETTERS)]
    assert [(one[HEADER_STAGE], one[HEADER_REASON]) for one in headers] == [
        (b"exporter", b"too_large"),
        *[(b"exporter", b"bad_field")] * 5,
    ]
    for message, part in zip(
        [one[HEADER_MESSAGE] for one in headers[1:]],
        [b"input_tokens", b"prompt_token_ids", b"logprobs", b"rollout_id", b"surrogates"],
        strict=True,
    ):
        assert part in message


def test_without_a_broker_export_fails_and_says_so(
    kept: tuple[TracerProvider, Keep], caplog: pytest.LogCaptureFixture
) -> None:
    provider, keep = kept
    provider.get_tracer("t").start_span("one").end()
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    producer = ProducerSettings(buffer_wait_seconds=0.2, delivery_seconds=0.2)
    with SyncPublisher(kafka, producer) as publisher:
        exporter = KafkaSpanExporter(Settings(kafka=kafka, producer=producer), publisher)
        assert exporter.export(keep.spans) is SpanExportResult.FAILURE
        exporter.shutdown()
        assert exporter.export(keep.spans) is SpanExportResult.FAILURE
    assert "1 spans may not have reached Kafka" in caplog.text

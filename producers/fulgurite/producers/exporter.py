"""An OpenTelemetry SpanExporter that publishes to the topic `spans`.

    provider = TracerProvider(resource=Resource({"agentlightning.rollout_id": "r1", "agentlightning.attempt_id": "a1"}))
    provider.add_span_processor(BatchSpanProcessor(KafkaSpanExporter(load_settings())))

The ids may stand on the resource (or in OTEL_RESOURCE_ATTRIBUTES: see `RolloutContext.environment`) or on each span;
without them a span is kept as a trace and trained on by nobody.

What it promises: `export` says SUCCESS only when the broker has acknowledged every span it was given, be it as a dead
letter because it is too large or no valid span; the others go on. What it cannot promise is what stands before it: a
BatchSpanProcessor drops spans when its queue is full, so size that queue, and flush the provider before an attempt's
end is reported. Does not know Kafka: it uses a SyncPublisher.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, cast

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode
from pydantic import ValidationError

from fulgurite.producers.redaction import Redactor, redactor
from fulgurite.producers.rollout import as_text, clean, describe
from fulgurite.producers.sync_publisher import Delivery, Send, SyncPublisher
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import FulguriteError, RecordTooLarge
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.spans import Span, SpanEvent, SpanLink
from fulgurite.schemas.topics import SPANS

logger = logging.getLogger(__name__)

STAGE = "exporter"

EXPORT_SECONDS = 30.0
"""Longest that `export` waits for acknowledgements: OpenTelemetry's own default for exporters."""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "rollout_id": ("agentlightning.rollout_id",),
    "attempt_id": ("agentlightning.attempt_id",),
    "sequence_id": ("agentlightning.span_sequence_id",),
    "service": ("service.name",),
    "agent": ("gen_ai.agent.name",),
    "operation": ("gen_ai.operation.name",),
    "model": ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name"),
    "endpoint": ("server.address", "gen_ai.openai.api_base", "url.full"),
    "finish_reason": ("gen_ai.response.finish_reasons", "gen_ai.response.finish_reason", "llm.finish_reason"),
    "input": ("gen_ai.input.messages", "gen_ai.prompt", "gen_ai.tool.call.arguments", "input.value"),
    "output": ("gen_ai.output.messages", "gen_ai.completion", "gen_ai.tool.call.result", "output.value"),
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"),
    "resource": ("fulgurite.resource",),
    "prompt_token_ids": ("fulgurite.prompt_token_ids", "prompt_token_ids"),
    "response_token_ids": ("fulgurite.response_token_ids", "response_token_ids"),
    "logprobs": ("fulgurite.logprobs",),
    "weight_versions": ("fulgurite.weight_versions",),
}
"""Field of a span -> attribute names, newest first. They stay on the span as well, except the long token lists."""

_LISTS = ("prompt_token_ids", "response_token_ids", "logprobs", "weight_versions")
_NUMBERS = ("sequence_id", "input_tokens", "output_tokens")
_NO_TEXTS = frozenset(name for field in ("rollout_id", "attempt_id", *_NUMBERS, *_LISTS) for name in COLUMNS[field])
"""Attributes of which ids, counts and tokens are made: no rule of redaction applies to these fields."""

# OpenInference names what a span is instead of the operation.
_OPERATION_OF_KIND = {"LLM": "chat", "TOOL": "execute_tool", "AGENT": "invoke_agent"}


class KafkaSpanExporter(SpanExporter):
    """Give it a publisher to share one; without, it makes its own from the settings and closes it."""

    def __init__(self, settings: Settings, publisher: SyncPublisher | None = None) -> None:
        self._publisher = publisher or SyncPublisher(settings.kafka, settings.producer, settings.redaction)
        self._redactor = redactor(settings.redaction)
        self._owned = publisher is None
        self._stopped = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """SUCCESS when every span is acknowledged, as a span or as a dead letter."""
        if self._stopped:
            return SpanExportResult.FAILURE
        try:
            deliveries = self._publisher.publish_all([self._send(span) for span in spans])
            _wait(deliveries)
        except (FulguriteError, TimeoutError) as error:
            logger.error("%d spans may not have reached Kafka: %s", len(spans), error)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        try:
            self._publisher.flush(timeout_millis / 1_000)
        except FulguriteError as error:
            logger.error("%s", error)
            return False
        return True

    def shutdown(self) -> None:
        """Flushes. What could not be delivered is logged."""
        if self._stopped:
            return
        self._stopped = True
        try:
            (self._publisher.close if self._owned else self._publisher.flush)()
        except FulguriteError as error:
            logger.error("%s", error)

    def _send(self, span: ReadableSpan) -> Send:
        try:
            event = to_span(span, self._redactor)
            if self._redactor is not None:
                event = self._redactor.event(event)
            key, value = encode_key(event.rollout_id), encode(event, self._publisher.max_record_bytes)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "span"
            dead = self._dead_letter(span, "bad_field", f"{where}: {first['msg']}")
        except RecordTooLarge as error:
            dead = self._dead_letter(span, error.reason, str(error))
        except Exception as error:  # attributes are anybody's: one span must not take the batch with it
            dead = self._dead_letter(span, "bad_field", describe(error))
        else:
            return lambda publisher: publisher.publish_bytes(SPANS, key, value)
        logger.warning("span %r becomes a dead letter: %s", span.name, dead.message)
        return lambda publisher: publisher.publish_dead_letter(dead)

    def _dead_letter(self, span: ReadableSpan, reason: str, message: str) -> DeadLetter:
        rollout_id = _first(_merged(span), COLUMNS["rollout_id"])
        dead = DeadLetter(
            topic=self._publisher.topic(SPANS),
            partition=-1,
            offset=-1,
            stage=STAGE,
            reason=reason,
            message=clean(message),
            key=as_text(rollout_id).encode() or None,
            value=_as_bytes(span) if self._redactor is None else _attributes_as_bytes(span, self._redactor),
        )
        return dead if self._redactor is None else self._redactor.dead_letter(dead)


def to_span(span: ReadableSpan, redactor: Redactor | None = None) -> Span:
    """The same span as our event; fields that are made of attributes follow the rules for these. Raises pydantic's
    ValidationError for values out of bounds."""
    attributes = dict(span.attributes or {})
    merged = _merged(span)
    if redactor is not None:
        merged = redactor.sources(merged, _NO_TEXTS)
    fields: dict[str, Any] = {}
    for name, candidates in COLUMNS.items():
        value = _first(merged, candidates)
        if value is not None:
            fields[name] = _as_field(name, value)
    if "operation" not in fields:
        fields["operation"] = _OPERATION_OF_KIND.get(str(merged.get("openinference.span.kind", "")).upper(), "")
    for name in _LISTS:
        for candidate in COLUMNS[name]:
            attributes.pop(candidate, None)
    context = span.get_span_context()
    start_ns = span.start_time or 0
    return Span(
        **fields,
        trace_id=f"{context.trace_id:032x}" if context is not None else "",
        span_id=f"{context.span_id:016x}" if context is not None else "",
        parent_span_id=f"{span.parent.span_id:016x}" if span.parent is not None else "",
        name=span.name,
        kind=cast(Any, span.kind.name.lower()),
        status=cast(
            Any, "unset" if span.status.status_code is StatusCode.UNSET else span.status.status_code.name.lower()
        ),
        status_message=(span.status.description or "")[:4_096],
        start_ns=start_ns,
        end_ns=span.end_time or start_ns,
        attributes=_plain(attributes),
        resource_attributes=_plain(dict(span.resource.attributes)),
        events=[
            SpanEvent(name=event.name, time_ns=event.timestamp, attributes=_plain(dict(event.attributes or {})))
            for event in span.events
        ],
        links=[
            SpanLink(
                trace_id=f"{link.context.trace_id:032x}",
                span_id=f"{link.context.span_id:016x}",
                attributes=_plain(dict(link.attributes or {})),
            )
            for link in span.links
        ],
    )


def _merged(span: ReadableSpan) -> Mapping[str, Any]:
    """A span's own attributes win over its resource's."""
    return {**span.resource.attributes, **(span.attributes or {})}


def _first(attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((attributes[name] for name in names if name in attributes), None)


def _as_field(name: str, value: Any) -> Any:
    """An attribute's value (scalars and sequences of them) as the field wants it."""
    if name in _LISTS:
        return _as_list(value)
    if name in _NUMBERS:
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        items = cast("Sequence[Any]", value)
        return str(items[0]) if len(items) == 1 else json.dumps(list(items))
    return str(value)


def _as_list(value: Any) -> Any:
    """A list, or JSON of one; anything else as it is, for validation to say what is wrong with which field."""
    if not isinstance(value, str):
        return list(cast("Sequence[Any]", value)) if isinstance(value, Sequence) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _as_bytes(span: ReadableSpan) -> bytes:
    """The span as OpenTelemetry writes it; where it cannot, its name and attributes as we do. Never raises."""
    try:
        return span.to_json(indent=None).encode()
    except (TypeError, ValueError, RecursionError):
        return as_text({"name": span.name, "attributes": dict(span.attributes or {})}).encode()


def _attributes_as_bytes(span: ReadableSpan, redactor: Redactor) -> bytes:
    """With rules: what they can be applied to, and nothing else. Never raises."""
    attributes = {as_text(name): as_text(value) for name, value in (span.attributes or {}).items()}
    return as_text({"name": span.name, "attributes": redactor.attributes(attributes)}).encode()


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}


def _wait(deliveries: Sequence[Delivery]) -> None:
    deadline = monotonic() + EXPORT_SECONDS
    for delivery in deliveries:
        delivery.result(max(0.0, deadline - monotonic()))

"""Whether bytes of OTLP would be refused: what tables and translator ask of each span, before it is sent again."""

from __future__ import annotations

from fulgurite.consumers.otlp.batches import otlp
from fulgurite.consumers.otlp.mend import BROKEN, mended
from fulgurite.consumers.otlp.spans import OtlpSpan, decode
from fulgurite.consumers.otlp.wire import Malformed
from fulgurite.consumers.translator.rewards import Refused, rewards_of
from fulgurite.schemas.errors import InvalidEvent

_TIMES_END = 2**63


def checked_spans(data: bytes) -> list[OtlpSpan]:
    """All spans of a TracesData, protobuf or JSON. Raises InvalidEvent where one of them would be refused."""
    try:
        spans = decode(mended(otlp(data)))
    except Malformed as error:
        raise InvalidEvent("rejected", str(error)) from None
    if not spans:
        raise InvalidEvent("rejected", "the record has no spans")
    for span in spans:
        if (why := _wrong(span)) is not None:
            raise InvalidEvent("bad_field", f"span {span.index}: {why}" if len(spans) > 1 else why)
        for reward in rewards_of(span):
            if isinstance(reward, Refused):
                raise InvalidEvent("bad_field", reward.message)
    return spans


def _wrong(span: OtlpSpan) -> str | None:
    if span.status % 2**32 == BROKEN % 2**32:
        return span.status_message
    if not span.span_id:
        return "spanId: must not be empty"
    if max(span.start_ns, span.end_ns) >= _TIMES_END:
        return "startTimeUnixNano, endTimeUnixNano: must be below 2^63"
    if span.end_ns < span.start_ns:
        return "endTimeUnixNano: is before startTimeUnixNano"
    if any(event.time_ns >= _TIMES_END for event in span.events):
        return "events: timeUnixNano: must be below 2^63"
    return None

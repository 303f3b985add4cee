"""What an attempt's record has beside its trajectory: the spans, as the aggregator reads them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from fulgurite.schemas.codec import MAX_DEPTH
from fulgurite.schemas.rollouts import RolloutFinished
from fulgurite.schemas.spans import Span

_LEVELS = MAX_DEPTH - 3
"""Left to a span's fields in the record: the attempt, its list of spans and the span are around them."""


def spans_of(spans: Sequence[Span], finished: RolloutFinished) -> tuple[list[Span], int]:
    """All spans of the attempt that counts, oldest first, without tokens; and how many are left out.

    Those are nested so deeply that the attempt's record, which has them further down, could not be read.
    """
    own = [span for span in spans if span.attempt_id in (finished.attempt_id, "")]
    own.sort(key=lambda span: (span.start_ns, span.sequence_id, span.end_ns, span.span_id))
    readable = [span.without_tokens() for span in own if _is_readable(span)]
    return readable, len(own) - len(readable)


def _is_readable(span: Span) -> bool:
    fields = (span.attributes, span.resource_attributes, span.state, span.model_extra)
    inner = (each.attributes for each in (*span.events, *span.links))  # two levels further down: a list, its element
    return all(_fits(each, _LEVELS) for each in fields) and all(_fits(each, _LEVELS - 2) for each in inner)


def _fits(value: Any, levels: int) -> bool:
    """Whether lists and objects in it are within each other at most so often."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).values()
    elif not isinstance(value, list):
        return True
    return levels > 0 and all(_fits(each, levels - 1) for each in cast("list[Any]", value))

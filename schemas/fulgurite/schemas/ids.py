"""Identifiers and clocks: how every event gets its id and its time."""

from __future__ import annotations

import hashlib
import os
import time
from functools import lru_cache
from typing import Annotated

from pydantic import StringConstraints

MAX_ID_CHARS = 128
"""Ids stand in URLs, Kafka keys and sort keys; longer ones are somebody's payload in the wrong field."""

Id = Annotated[str, StringConstraints(max_length=MAX_ID_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@=+-]*$")]
"""An identifier a caller may choose: safe in a URL path and in a file name."""

OptionalId = Annotated[str, StringConstraints(max_length=MAX_ID_CHARS, pattern=r"^([A-Za-z0-9][A-Za-z0-9._:@=+-]*)?$")]
"""The same, or empty where there is none."""

SpanId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]
"""Of a span, within its attempt: any text, as its tracer makes it. It stands in no URL, key or file name. OTLP's bytes
are their lower-case hex everywhere here."""

OptionalSpanId = Annotated[str, StringConstraints(max_length=MAX_ID_CHARS)]
"""Whatever points to a span (a parent, a link, a reward, a call of a trajectory); empty: to none."""


def new_id() -> str:
    """A UUIDv7 (RFC 9562) as 32 hex digits: unique without coordination, sorts by time."""
    milliseconds = time.time_ns() // 1_000_000
    value = bytearray(milliseconds.to_bytes(6, "big") + os.urandom(10))
    value[6] = (value[6] & 0x0F) | 0x70
    value[8] = (value[8] & 0x3F) | 0x80
    return value.hex()


def new_trace_id() -> str:
    """16 random bytes as hex, as W3C trace context wants them."""
    return os.urandom(16).hex()


@lru_cache(maxsize=1 << 14)  # the calls of an attempt come close together
def attempt_trace_id(rollout_id: str, attempt_id: str) -> str:
    """The trace id of an attempt: whoever records a span of it arrives at the same one without having to talk.

    A caller that brings a trace of its own (W3C `traceparent`) keeps that one instead.
    """
    return hashlib.sha256(f"{rollout_id}/{attempt_id}".encode()).digest()[:16].hex()


def new_span_id() -> str:
    """8 random bytes as hex."""
    return os.urandom(8).hex()


def now_ns() -> int:
    """Nanoseconds since the Unix epoch: the unit of every `*_ns` field."""
    return time.time_ns()

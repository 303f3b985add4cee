"""Loads for the ingestion benchmark: spans of about 700 bytes of JSON with ten attributes, and the same as OTLP."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "consumers"))
from otlp_encoding import any_value, fixed, integer, part  # pyright: ignore[reportMissingImports]

from fulgurite.schemas.ids import new_id

SPANS_A_RECORD = 100
START_NS = 1_795_000_000_000_000_000

_KINDS = (("chat policy", "client", "chat"), ("execute_tool calculator", "internal", "execute_tool"))


def attributes(rand: random.Random) -> dict[str, str]:
    return {
        "gen_ai.request.model": "policy",
        "gen_ai.request.temperature": "1.0",
        "gen_ai.usage.input_tokens": str(rand.randrange(2_000)),
        "gen_ai.usage.output_tokens": str(rand.randrange(300)),
        "server.address": f"10.0.{rand.randrange(256)}.{rand.randrange(256)}",
        "http.response.status_code": "200",
        "session.id": f"{rand.getrandbits(64):016x}",
        "worker": f"runner-{rand.randrange(64)}",
        "task.difficulty": rand.choice(["easy", "hard"]),
        "note": "x" * rand.randrange(12, 52),
    }


def span(rand: random.Random, rollout_id: str, attempt_id: str, trace_id: str, number: int) -> dict[str, object]:
    name, kind, operation = _KINDS[number % 2]
    start_ns = START_NS + number * 50_000_000 + rand.randrange(1_000_000)
    return {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "trace_id": trace_id,
        "span_id": f"{rand.getrandbits(64):016x}",
        "parent_span_id": trace_id[:16],
        "name": name,
        "kind": kind,
        "status": "ok",
        "start_ns": start_ns,
        "end_ns": start_ns + rand.randrange(10**9),
        "service": "bench",
        "operation": operation,
        "attributes": attributes(rand),
    }


def records(count: int, seed: int, *, distinct: int = 500) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of `count` records of SPANS_A_RECORD spans: `distinct` ones, under ever new rollouts.

    Ids are as Fulgurite makes them, in the order of time: rollouts that come together lie together in the table.
    """
    rand = random.Random(seed)
    templates: list[bytes] = []
    for _ in range(min(count, distinct)):
        lines = (span(rand, "R" * 32, "A" * 32, "T" * 32, number) for number in range(SPANS_A_RECORD))
        templates.append(b"\n".join(json.dumps(line, separators=(",", ":")).encode() for line in lines))
    for number in range(count):
        rollout, attempt = new_id().encode(), new_id().encode()
        value = templates[number % len(templates)].replace(b"R" * 32, rollout)
        value = value.replace(b"T" * 32, b"%032x" % rand.getrandbits(128))
        yield rollout, value.replace(b"A" * 32, attempt)


def otlp_records(count: int, seed: int, *, distinct: int = 200) -> Iterator[tuple[bytes, bytes]]:
    """As a Collector's Kafka exporter writes them: one TracesData of SPANS_A_RECORD spans each."""
    rand = random.Random(seed)
    templates: list[bytes] = []
    for _ in range(min(count, distinct)):
        spans = b"".join(part(2, _otlp_span(rand, number)) for number in range(SPANS_A_RECORD))
        resource = part(1, _attribute("service.name", "bench"))
        templates.append(part(1, part(1, resource) + part(2, spans)))
    for number in range(count):
        rollout = new_id().encode()
        value = templates[number % len(templates)].replace(b"R" * 32, rollout)
        yield rollout, value.replace(b"T" * 16, rand.randbytes(16))


def _attribute(key: str, value: str) -> bytes:
    return part(1, key.encode()) + part(2, any_value(value))


def _otlp_span(rand: random.Random, number: int) -> bytes:
    name, _, operation = _KINDS[number % 2]
    start_ns = START_NS + number * 50_000_000
    values = {"fulgurite.rollout_id": "R" * 32, "gen_ai.operation.name": operation, **attributes(rand)}
    fields = part(1, b"T" * 16) + part(2, rand.randbytes(8)) + part(5, name.encode()) + integer(6, 3)
    times = fixed(7, start_ns) + fixed(8, start_ns + rand.randrange(10**9))
    return fields + times + b"".join(part(9, _attribute(key, value)) for key, value in values.items())

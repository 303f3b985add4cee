"""OTLP of every sort in one partition, through the real broker and the running materialiser: nothing stops it, and
everything is there once."""

from __future__ import annotations

import asyncio
import gzip

from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import OTLP_SPANS
from tests.consumers.otlp_encoding import part, record, span
from tests.consumers.test_materialiser_records import ask, materialiser, producer, until

DEEP = {"gen_ai.input.messages": [{"role": "user", "parts": [{"type": "text", "content": "hi"}]}]}


async def test_every_sort_of_record_and_a_restart(settings: Settings) -> None:
    broken = span(more=part(9, part(2, b"\x0a\xff")))
    values = [
        (b"trace", record(span(), span())),
        (None, record(span(DEEP), broken, span(span_id=b""))),
        (b"", gzip.compress(record(span()), mtime=0)),
        (b"rollout", record(span())[:-3]),
        (None, b"no OTLP at all"),
        (b"x", b'{"resourceSpans": []}'),
        (None, record(span(name="last"))),
    ]
    topic = settings.kafka.topic(OTLP_SPANS)
    rows = "SELECT _offset, _index FROM spans ORDER BY ALL"
    wanted = [(at, index) for at, index in ((0, 0), (0, 1), (1, 0), (6, 0))]
    dead = "SELECT _offset, _index, reason FROM dead_letters ORDER BY ALL"
    refused = [(1, 1, "bad_field"), (1, 2, "bad_field"), *((at, 0, "rejected") for at in (2, 3, 4, 5))]
    async with producer(settings) as client:
        for key, value in values:
            await client.send_and_wait(topic, value, key, partition=0)
        async with materialiser(settings):
            await until(settings, rows, lambda found: len(found) >= len(wanted))
            await until(settings, dead, lambda found: len(found) >= len(refused))
        async with materialiser(settings):
            await client.send_and_wait(topic, record(span(DEEP)), None, partition=0)
            await until(settings, rows, lambda found: (7, 0) in found)
    assert await asyncio.to_thread(ask, settings, rows) == [*wanted, (7, 0)]
    assert await asyncio.to_thread(ask, settings, dead) == refused
    duplicates = "SELECT sum(duplicates) FROM reconciliation"
    assert await asyncio.to_thread(ask, settings, duplicates) == [(0,)]
    texts = await asyncio.to_thread(ask, settings, "SELECT DISTINCT input FROM spans WHERE input != ''")
    assert texts == [('[{"role":"user","parts":[{"type":"text","content":"hi"}]}]',)]

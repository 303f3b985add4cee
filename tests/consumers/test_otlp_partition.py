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


async def test_a_stream_of_what_is_no_otlp_does_not_hold_up_the_rest(settings: Settings) -> None:
    """As of a Collector with another encoding: an insert each would take minutes, and the slots of all topics."""
    zipkin = b'[{"traceId": "5982fe77008310cc80f1da5e10147517", "name": "get"}]'
    count = 6_000
    async with producer(settings) as client:
        for at in range(count):
            await client.send(settings.kafka.topic(OTLP_SPANS), zipkin if at % 10 else record(span()), partition=at % 2)
        await client.flush()
        async with materialiser(settings):
            await until(settings, "SELECT count() FROM spans", lambda found: found == [(count // 10,)])
            await until(settings, "SELECT count() FROM dead_letters", lambda found: found == [(count - count // 10,)])
            ended = "SELECT sum(hi + 1) FROM (SELECT max(hi) AS hi FROM ingest_log GROUP BY _partition)"
            await until(settings, ended, lambda found: found == [(count,)])
    once = "SELECT sum(rows), sum(dead), sum(duplicates), sum(gaps) FROM reconciliation"
    assert await asyncio.to_thread(ask, settings, once) == [(count // 10, count - count // 10, 0, 0)]
    why = "SELECT DISTINCT reason, message FROM dead_letters"
    assert await asyncio.to_thread(ask, settings, why) == [("rejected", "a field has the wire type 3")]


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

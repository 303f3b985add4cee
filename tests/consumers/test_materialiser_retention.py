"""Rows that expire are not missed: the materialiser goes on where it was, and what was there is not there twice."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fulgurite.schemas import topics
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.retention import RetentionSettings
from fulgurite.schemas.settings import Settings
from tests.infra.dlq_world import World, span

OLD_MS = int((time.time() - 100 * 86_400) * 1000)


async def test_expired_rows_are_not_read_again(settings: Settings, tmp_path: Path) -> None:
    world = World(settings.model_copy(update={"retention": RetentionSettings(spans_days=30)}), tmp_path)
    await asyncio.to_thread(apply_migrations, settings.clickhouse)
    world.ask("ALTER TABLE spans MODIFY SETTING merge_with_ttl_timeout = 0")
    await world.produce(topics.SPANS, [span(span_id=f"old-{n}") for n in range(20)], timestamp_ms=OLD_MS)
    await world.produce(topics.SPANS, [span(span_id=f"new-{n}") for n in range(5)])
    async with world.materialiser():
        await world.until("SELECT max(hi) + 1 FROM ingest_log", lambda rows: rows == [(25,)])
        await only_new_rows(world, 5)
    async with world.materialiser():
        await world.produce(topics.SPANS, [span(span_id=f"new-{n}") for n in range(5, 10)])
        await only_new_rows(world, 10)
    # As after a crash before step 3, but with rows that expired since: they are written once more and expire again.
    world.ask("TRUNCATE TABLE ingest_log")
    async with world.materialiser():
        await world.until("SELECT max(hi) + 1 FROM ingest_log", lambda rows: rows[0][0] >= 20)
        await only_new_rows(world, 10)


async def only_new_rows(world: World, count: int) -> None:
    sql = "SELECT count(), uniqExact(span_id), countIf(span_id LIKE 'old%') FROM spans"
    await world.until(sql, lambda rows: rows == [(count, count, 0)])

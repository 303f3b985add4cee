"""What passes by itself costs lag and nothing else: ClickHouse away for longer than every time limit, a table away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.schemas import topics
from fulgurite.schemas.settings import KafkaSettings, Settings
from tests.infra.dlq_world import QUICK, World, span

AWAY_SECONDS = 2 * QUICK.session_seconds
"""Longer than an insert may take and longer than the group waits for a silent member."""
BURSTS = 12
PER_BURST = 200


async def load(world: World) -> None:
    """Some records every second, one in ten of them poison."""
    for burst in range(BURSTS):
        numbers = range(burst * PER_BURST, (burst + 1) * PER_BURST)
        values = [b"poison %d" % n if n % 10 == 9 else span(span_id=str(n)) for n in numbers]
        await world.produce(topics.SPANS, values, partition=burst % 2)
        await asyncio.sleep(AWAY_SECONDS / BURSTS)


async def assert_only_lag(world: World) -> None:
    """Every record is there once; only what was poison is a dead letter."""
    total, poison = BURSTS * PER_BURST, BURSTS * PER_BURST // 10
    await world.until("SELECT sum(rows + dead) FROM reconciliation", lambda rows: rows == [(total,)], seconds=90)
    assert world.ask("SELECT sum(rows), sum(dead), sum(duplicates), sum(gaps) FROM reconciliation") == [
        (total - poison, poison, 0, 0)
    ]
    assert world.ask("SELECT DISTINCT reason FROM dead_letters") == [("not_json",)]
    assert world.ask("SELECT uniqExact(span_id) FROM spans") == [(total - poison,)]


@pytest.mark.chaos
@pytest.mark.slow
async def test_clickhouse_is_away_under_load(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    with EmbeddedClickHouse(tmp_path / "clickhouse") as engine:
        world = World(Settings(kafka=kafka_settings, clickhouse=engine.settings("outage")), tmp_path)
        async with world.materialiser():
            loading = asyncio.create_task(load(world))
            await world.until("SELECT count() FROM spans", lambda rows: rows[0][0] > 0)
            await asyncio.to_thread(engine.kill)
            await loading
            await asyncio.to_thread(engine.start)
            await assert_only_lag(world)


@pytest.mark.slow
async def test_a_table_is_away_under_load(settings: Settings, tmp_path: Path) -> None:
    """A server that refuses everything, with an error of its own, is taken for ill, not its records for poison."""
    world = World(settings, tmp_path)
    async with world.materialiser():
        loading = asyncio.create_task(load(world))
        await world.until("SELECT count() FROM spans", lambda rows: rows[0][0] > 0)
        world.ask("RENAME TABLE spans TO elsewhere")
        await loading
        world.ask("RENAME TABLE elsewhere TO spans")
        await assert_only_lag(world)

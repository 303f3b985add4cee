"""ClickHouse is restored from an older backup under a materialiser that runs: what the copy lacks is inserted again,
and nothing comes twice."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fulgurite.consumers.materialiser import topic as topic_module
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.schemas import topics
from fulgurite.schemas.settings import KafkaSettings, Settings
from tests.consumers.materialiser_fakes import FakeRecord, Member, Server
from tests.consumers.test_materialiser_metrics import free_port, ready, running
from tests.infra.dlq_world import QUICK, World, span


@pytest.fixture
async def member(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Member]:
    monkeypatch.setattr(topic_module, "QUIET_SECONDS", 0.01)
    found = Member(Server())
    yield found
    await found.stop()


async def test_what_the_database_lost_is_read_again_and_the_rest_not_twice(member: Member) -> None:
    await member.start()
    member.append(0, [FakeRecord(at) for at in range(10)])
    await member.until(lambda: member.server.log.get(0) == 10)
    for at in (4, 5, 7):
        del member.server.rows[0, at]
    member.server.log[0] = 4
    member.writer.unsettle(member.buffers[0].partition)
    await member.until(lambda: member.buffers[0].settled)
    assert member.consumer.at == {0: 4}
    member.append(0, [FakeRecord(at) for at in range(4, 12)])
    await member.until(lambda: member.server.log[0] == 12)
    assert member.server.rows == {(0, at): 1 for at in range(12)}


async def test_what_was_inserted_and_not_logged_is_not_read_again(member: Member) -> None:
    await member.start()
    member.append(0, [FakeRecord(at) for at in range(10)])
    await member.until(lambda: member.server.log.get(0) == 10)
    member.consumer.at.clear()
    member.server.log[0] = 4
    member.writer.unsettle(member.buffers[0].partition)
    await member.until(lambda: member.buffers[0].settled)
    assert member.consumer.at == {}
    assert member.server.log[0] == 10


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("goes_on", [True, False])
async def test_an_older_backup_that_is_restored_gets_what_it_lacks(
    kafka_settings: KafkaSettings, tmp_path: Path, goes_on: bool
) -> None:
    (tmp_path / "data").mkdir()
    engine = EmbeddedClickHouse(tmp_path / "engine")
    await asyncio.to_thread(engine.start)
    try:
        own = QUICK.model_copy(update={"port": free_port()})
        settings = Settings(kafka=kafka_settings, clickhouse=engine.settings(database="fulgurite"), materialiser=own)
        world = World(settings, tmp_path / "data")
        logged = f"SELECT max(hi) FROM ingest_log WHERE _topic = '{world.name(topics.SPANS)}'"

        async def produce(letter: str, last: int) -> None:
            await world.produce(topics.SPANS, [span(span_id=f"{letter}{number}") for number in range(5)])
            await world.until(logged, lambda rows: rows == [(last,)])

        async with running(settings) as http:
            await produce("a", 4)
            await asyncio.to_thread(engine.stop)
            shutil.copytree(tmp_path / "engine", tmp_path / "backup", symlinks=True)
            await asyncio.to_thread(engine.start)
            await produce("b", 9)
            await asyncio.to_thread(engine.stop)
            shutil.rmtree(tmp_path / "engine")
            shutil.copytree(tmp_path / "backup", tmp_path / "engine", symlinks=True)
            await asyncio.to_thread(engine.start)
            if goes_on:
                await produce("c", 14)
            await world.until(
                "SELECT left(span_id, 1) AS k, count(), uniqExact(span_id) FROM spans GROUP BY k ORDER BY k",
                lambda rows: rows == [(letter, 5, 5) for letter in ("abc" if goes_on else "ab")],
            )
            await ready(http, 200)
    finally:
        await asyncio.to_thread(engine.stop)

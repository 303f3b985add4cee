"""A log that lost its tail, or was made anew, is never taken for the one whose records the tables have: its partition
stands still and says so, the others go on, and so does it when its log and its tables agree again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from fulgurite.consumers.materialiser import topic as topic_module
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas import topics
from fulgurite.schemas.settings import ClickHouseSettings, KafkaSettings, MaterialiserSettings, Settings
from tests.consumers.materialiser_fakes import FakeRecord, Member, Server
from tests.consumers.test_materialiser_metrics import free_port, ready, running
from tests.infra.dlq_world import QUICK, World, span

NEW = "SELECT count(), uniqExact(span_id) FROM spans WHERE span_id LIKE 'new%'"


@pytest.fixture
async def member(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Member]:
    for name in ("QUIET_SECONDS", "LOOK_AGAIN_SECONDS"):
        monkeypatch.setattr(topic_module, name, 0.01)
    found = Member(Server(), range(2))
    yield found
    await found.stop()


def records(*offsets: int) -> list[FakeRecord]:
    return [FakeRecord(offset, timestamp=1) for offset in offsets]


def reasons(member: Member) -> str:
    return str(member.metrics.not_ready(60))


async def inserted(member: Member, *offsets: int) -> None:
    await member.start()
    member.append(0, records(*offsets))
    await member.until(lambda: member.server.log.get(0) == offsets[-1] + 1)


async def test_a_log_that_ends_before_what_the_tables_have_stands_still_until_they_agree(member: Member) -> None:
    member.server.log[0] = 2_000
    member.task = asyncio.create_task(member.writer.run())
    await member.until(lambda: "ends at offset 1000, but ClickHouse has its records up to 1999" in reasons(member))
    member.append(1, records(0))
    await member.until(lambda: member.server.rows[1, 0] == 1)
    assert 0 not in member.server.fences, "it is not even fenced"
    member.server.log[0] = 0
    await member.until(lambda: member.buffers[0].settled)
    assert "rollouts-0" not in reasons(member)


async def test_a_log_with_other_records_at_the_same_offsets_stands_still_until_their_rows_are_gone(
    member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    await inserted(member, *range(10))
    member.server.times = {(0, at): 7 for at in range(4, 10)}
    member.writer.doubt(member.buffers[0].tp, "its epoch is another one")
    await member.until(lambda: "another record at offset 4 than ClickHouse has a row of" in reasons(member))
    member.append(0, records(10))
    member.append(1, records(0))
    await member.until(lambda: member.server.rows[1, 0] == 1)
    assert (0, 10) not in member.server.rows
    assert "rollout_events, dead_letters and ingest_log" in caplog.text
    for at in range(4, 10):
        del member.server.rows[0, at]
    member.server.log[0] = 4
    await member.until(lambda: member.buffers[0].settled)
    assert member.consumer.at[0] == 4
    member.append(0, records(*range(4, 12)))
    await member.until(lambda: member.server.log[0] == 12)
    assert member.server.rows == {(0, at): 1 for at in range(12)} | {(1, 0): 1}


async def test_a_topic_that_was_made_anew_is_known_by_its_id(member: Member) -> None:
    await inserted(member, *range(5))
    member.history.incarnation = cast(Any, type(member.history.incarnation)("another", 0))
    member.writer.doubt(member.buffers[0].tp, "the topic was made anew")
    await member.until(lambda: "of another topic now than ClickHouse has records of, up to 4" in reasons(member))
    member.server.rows.clear()
    member.server.log.clear()
    await member.until(lambda: member.buffers[0].settled)
    assert member.consumer.at[0] == 0


async def test_what_was_read_and_not_taken_is_read_again_after_doubt(member: Member) -> None:
    await member.start()
    member.buffers[0].append(cast(Any, records(*range(5))))
    member.writer.doubt(member.buffers[0].tp, "its leader is another one")
    assert (member.buffers[0].bytes, member.budget.used) == (0, 0)
    await member.until(lambda: member.buffers[0].settled)
    assert member.consumer.at[0] == 0
    assert member.consumer.paused == set()


def cut(folder: Path, name: str, keep: int) -> None:
    """Off a log, all records but so many, as a power failure does. Each is a batch."""
    (segment,) = (folder / "log" / f"{name}-0").glob("*.log")
    data, at = segment.read_bytes(), 0
    for _ in range(keep):
        (length,) = struct.unpack_from(">i", data, at + 8)
        at += 12 + length
    with segment.open("r+b") as file:
        file.truncate(at)


async def made_anew(world: World) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=world.settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_topics([world.name(topics.SPANS)])
        await asyncio.sleep(1)
        await admin.create_topics([NewTopic(world.name(topics.SPANS), 2, 1)])
        await asyncio.sleep(1)
    finally:
        await admin.close()


async def not_ready(http: httpx.AsyncClient, what: str, seconds: float = 30) -> None:
    answer = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while what not in answer:
                with contextlib.suppress(httpx.TransportError):
                    answer = (await http.get("/ready")).text
                await asyncio.sleep(0.1)
    assert what in answer


def forget_from(world: World, offset: int) -> None:
    """As docs/operations.md says."""
    name = world.name(topics.SPANS)
    for table in ("spans", "dead_letters"):
        world.ask(
            f"ALTER TABLE {table} DELETE WHERE _topic = '{name}' AND _partition = 0 AND _offset >= {offset} "
            "SETTINGS mutations_sync = 1"
        )
    world.ask(
        f"ALTER TABLE ingest_log DELETE WHERE _topic = '{name}' AND _partition = 0 AND hi >= {offset} "
        "SETTINGS mutations_sync = 1"
    )


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> World:
    return World(settings.model_copy(update={"materialiser": with_port()}), tmp_path)


def with_port() -> MaterialiserSettings:
    return QUICK.model_copy(update={"port": free_port()})


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("live", [True, False])
async def test_a_power_failure_of_kafka_hides_nothing_that_was_acknowledged_since(
    clickhouse_settings: ClickHouseSettings, tmp_path: Path, live: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "data").mkdir()
    with EmbeddedKafka(tmp_path / "kafka") as kafka:
        own = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, partitions=1)
        await create_topics(own)
        settings = Settings(kafka=own, clickhouse=clickhouse_settings, materialiser=with_port())
        world = World(settings, tmp_path / "data")
        async with contextlib.AsyncExitStack() as stack:
            http = httpx.AsyncClient()  # of nobody yet
            if live:
                http = await stack.enter_async_context(running(settings))
            async with contextlib.nullcontext() if live else running(settings):
                for number in range(20):
                    await world.produce(topics.SPANS, [span(span_id=f"old{number}")])
                await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(19,)])
            await asyncio.to_thread(kafka.kill)
            cut(tmp_path / "kafka", world.name(topics.SPANS), 12)
            await asyncio.to_thread(kafka.start)
            assert await world.produce(topics.SPANS, [span(span_id=f"new{number}") for number in range(15)]) == 26
            if not live:
                http = await stack.enter_async_context(running(settings))
            await not_ready(http, "another record at offset 12 than ClickHouse has a row of")
            assert "another record at offset 12" in caplog.text
            await world.produce(topics.REWARDS, [b"of another topic"])
            await world.until("SELECT count() FROM dead_letters", lambda rows: rows == [(1,)])
            forget_from(world, 12)
            await world.until(NEW, lambda rows: rows == [(15, 15)])
            await ready(http, 200)
            assert world.ask("SELECT count() FROM spans") == [(27,)]


@pytest.mark.slow
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("old", [10, 100])
async def test_a_topic_that_was_made_anew_is_not_taken_for_the_old_one(world: World, live: bool, old: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        http = httpx.AsyncClient()  # of nobody yet
        if live:
            http = await stack.enter_async_context(running(world.settings))
        async with contextlib.nullcontext() if live else running(world.settings):
            await world.produce(topics.SPANS, [span(span_id=f"old{number}") for number in range(old)])
            await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(old - 1,)])
        await made_anew(world)
        await world.produce(topics.SPANS, [span(span_id=f"new{number}") for number in range(15)])
        if not live:
            http = await stack.enter_async_context(running(world.settings))
        await not_ready(http, "the topic was deleted and created again")
        forget_from(world, 0)
        await world.until(NEW, lambda rows: rows == [(15, 15)])
        await ready(http, 200)


async def test_a_database_of_another_cluster_is_said(world: World) -> None:
    name = world.name(topics.SPANS)
    world.ask(f"INSERT INTO ingest_log (_topic, _partition, lo, hi, records) VALUES ('{name}', 0, 0, 499, 500)")
    async with running(world.settings) as http:
        await not_ready(http, "ends at offset 0, but ClickHouse has its records up to 499")


@pytest.mark.slow
async def test_a_topic_that_is_not_there_is_said(world: World) -> None:
    async with running(world.settings) as http:
        await world.produce(topics.SPANS, [span(span_id="first")])
        await ready(http, 200)
        admin = AIOKafkaAdminClient(bootstrap_servers=world.settings.kafka.bootstrap_servers)
        await admin.start()
        await admin.delete_topics([world.name(topics.SPANS)])
        await admin.close()
        await not_ready(http, "the topic is not in Kafka")

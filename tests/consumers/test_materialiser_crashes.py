"""Exactly once, whatever dies: the materialiser between any two of its steps, ClickHouse under load, a consumer that
joins.

The materialiser runs as a process of its own: this file, called with the name of the step to die after.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from fulgurite.consumers.materialiser import serve
from fulgurite.consumers.materialiser.blocks import Partition
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.producers.service import run_service
from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.rollouts import RolloutQueued
from fulgurite.schemas.settings import KafkaSettings, MaterialiserSettings, Settings, load_settings, to_environment
from fulgurite.schemas.spans import Span

QUICK = MaterialiserSettings(batch_wait_ms=50, insert_seconds=4, session_seconds=6)


def ask(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    with clickhouse_connect.get_client(
        **connection_options(settings.clickhouse), database=settings.clickhouse.database
    ) as client:
        return [tuple(row) for row in client.query(sql).result_rows]


async def until_rows(settings: Settings, table: str, count: int, seconds: float = 60) -> None:
    """Until the table has at least so many rows and its partitions are told to be done."""
    found = -1
    for _ in range(int(seconds / 0.1)):
        with contextlib.suppress(Exception):
            found = (await asyncio.to_thread(ask, settings, f"SELECT count() FROM {table}"))[0][0]
            if found >= count:
                return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{table} has {found} of {count} rows")


@contextlib.contextmanager
def process(settings: Settings, die_after: str = "") -> Generator[subprocess.Popen[bytes]]:
    environment = to_environment(
        {
            "kafka": settings.kafka.model_dump(exclude={"sasl_password", "sasl_username", "ssl_cafile"}),
            "clickhouse": {
                **settings.clickhouse.model_dump(exclude={"password"}),
                "password": settings.clickhouse.password.get_secret_value(),
            },
            "materialiser": settings.materialiser.model_dump(),
        }
    )
    child = subprocess.Popen([sys.executable, __file__, die_after], env={**os.environ, **environment})
    try:
        yield child
    finally:
        child.kill()
        child.wait()


async def wait_for(child: subprocess.Popen[bytes], seconds: float = 60) -> int:
    return await asyncio.to_thread(child.wait, seconds)


def span(number: int) -> bytes:
    if number % 10 == 9:
        return b"poison %d" % number
    return encode(Span(rollout_id=f"r{number % 7}", span_id=str(number), name="n", start_ns=1, end_ns=2))


async def produce(settings: Settings, numbers: range, pause_seconds: float = 0.0) -> None:
    client = AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers, acks="all", enable_idempotence=True)
    await client.start()
    try:
        for number in numbers:
            await client.send(settings.kafka.topic(topics.SPANS), span(number), partition=number % 2)
            if pause_seconds and number % 100 == 0:
                await asyncio.sleep(pause_seconds)
        await client.flush()
    finally:
        await client.stop()


def assert_exactly_once(settings: Settings, count: int) -> None:
    """Every one of `count` spans in its table or among the dead letters, once, with its own bytes."""
    assert ask(settings, "SELECT sum(rows), sum(dead), sum(duplicates), sum(gaps) FROM reconciliation") == [
        (count - count // 10, count // 10, 0, 0)
    ]
    assert ask(settings, "SELECT uniqExact(span_id), sum(toUInt64(span_id)) FROM spans") == [
        (count - count // 10, sum(n for n in range(count) if n % 10 != 9))
    ]
    assert ask(settings, "SELECT uniqExact(value) FROM dead_letters") == [(count // 10,)]


@pytest.fixture
def quick(settings: Settings) -> Settings:
    return settings.model_copy(update={"materialiser": QUICK})


@pytest.mark.chaos
@pytest.mark.parametrize("step", ["claimed", "fenced", "settled", "cut", "inserted", "logged", "committed"])
async def test_killed_after_a_step(quick: Settings, step: str) -> None:
    await produce(quick, range(200))
    with process(quick, die_after=step) as child:
        assert await wait_for(child) == -signal.SIGKILL
    await produce(quick, range(200, 300))
    with process(quick, die_after=step) as child:
        assert await wait_for(child) == -signal.SIGKILL
    with process(quick):
        await until_rows(quick, "spans", 270)
        await until_rows(quick, "dead_letters", 30)
        await asyncio.sleep(1)
    assert_exactly_once(quick, 300)


async def test_an_insert_that_filled_only_one_table(quick: Settings) -> None:
    """What a crash of ClickHouse in the middle leaves: the good rows are there, the dead letters are not, or the other
    way."""
    await produce(quick, range(100))
    await asyncio.to_thread(apply_migrations, quick.clickhouse)
    with process(quick, die_after="inserted") as child:
        assert await wait_for(child) == -signal.SIGKILL
    before = ask(quick, "SELECT count() FROM dead_letters")[0][0]
    ask(quick, "TRUNCATE TABLE dead_letters")
    assert before > 0
    with process(quick):
        await until_rows(quick, "spans", 90)
        await until_rows(quick, "dead_letters", 10)
        await asyncio.sleep(1)
    assert_exactly_once(quick, 100)


async def test_an_insert_of_lines_that_filled_only_one_table(quick: Settings) -> None:
    """Good and bad lines of one record belong in two tables; the crash left one of them without its part."""
    client = AIOKafkaProducer(bootstrap_servers=quick.kafka.bootstrap_servers, acks="all")
    await client.start()
    try:
        for record in range(10):
            lines = b"\n".join(span(number) for number in range(10 * record, 10 * record + 10))
            await client.send_and_wait(quick.kafka.topic(topics.SPANS), lines, partition=0)
    finally:
        await client.stop()
    with process(quick, die_after="inserted") as child:
        assert await wait_for(child) == -signal.SIGKILL
    assert ask(quick, "SELECT uniqExact(_offset), count() FROM dead_letters") == [(10, 10)]
    ask(quick, "TRUNCATE TABLE dead_letters")
    with process(quick):
        await until_rows(quick, "dead_letters", 10)
        await asyncio.sleep(1)
    assert_exactly_once(quick, 100)


@pytest.mark.parametrize("step", ["claimed", "cut"])
async def test_a_zombie_that_wakes_up(quick: Settings, step: str) -> None:
    """Frozen between two steps for longer than its session; its successor does the work; then it goes on."""
    await produce(quick, range(100))
    with process(quick, die_after=f"stop:{step}") as zombie:
        await asyncio.to_thread(os.waitid, os.P_PID, zombie.pid, os.WSTOPPED | os.WNOWAIT)
        with process(quick) as successor:
            await until_rows(quick, "spans", 90)
            zombie.send_signal(signal.SIGCONT)
            await produce(quick, range(100, 200))
            await until_rows(quick, "spans", 180)
            await until_rows(quick, "dead_letters", 20)
            await asyncio.sleep(2)
            assert successor.poll() is None
            assert zombie.poll() is None
    assert_exactly_once(quick, 200)


@pytest.mark.chaos
@pytest.mark.slow
async def test_clickhouse_is_killed_under_load(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    count = 20_000
    with EmbeddedClickHouse(tmp_path / "clickhouse") as engine:
        settings = Settings(kafka=kafka_settings, clickhouse=engine.settings("chaos"), materialiser=QUICK)
        async with running(settings):
            load = asyncio.create_task(produce(settings, range(count), pause_seconds=0.02))
            for _ in range(4):
                await asyncio.sleep(1.5)
                await asyncio.to_thread(engine.kill)
                await asyncio.sleep(0.3)
                await asyncio.to_thread(engine.start)
            await load
            await until_rows(settings, "spans", count - count // 10, seconds=90)
            await until_rows(settings, "dead_letters", count // 10)
            await asyncio.sleep(1)
        assert_exactly_once(settings, count)


@pytest.mark.chaos
@pytest.mark.slow
async def test_a_second_consumer_joins_and_the_first_is_killed(quick: Settings) -> None:
    count = 10_000
    load = asyncio.create_task(produce(quick, range(count), pause_seconds=0.05))
    with process(quick) as first:
        await until_rows(quick, "spans", 500)
        with process(quick):
            await until_rows(quick, "spans", 3_000)
            first.kill()
            await load
            await until_rows(quick, "spans", count - count // 10)
            await until_rows(quick, "dead_letters", count // 10)
            await asyncio.sleep(1)
    assert_exactly_once(quick, count)


async def test_commits_follow_and_transactions_are_respected(quick: Settings) -> None:
    """An aborted transaction leaves no row; the group's offsets end behind the last record."""
    name = quick.kafka.topic(topics.ROLLOUTS)
    client = AIOKafkaProducer(bootstrap_servers=quick.kafka.bootstrap_servers, transactional_id=f"{name}-test")
    await client.start()
    async with running(quick):
        for number, commit in enumerate([True, False, True]):
            await client.begin_transaction()
            await client.send_and_wait(name, encode(RolloutQueued(rollout_id=f"r{number}")), partition=0)
            await (client.commit_transaction() if commit else client.abort_transaction())
        await client.stop()
        await until_rows(quick, "rollouts", 2)
        await asyncio.sleep(2)
    assert ask(quick, "SELECT rollout_id FROM rollouts ORDER BY rollout_id") == [("r0",), ("r2",)]
    admin = AIOKafkaAdminClient(bootstrap_servers=quick.kafka.bootstrap_servers)
    await admin.start()
    try:
        committed = await admin.list_consumer_group_offsets(f"{quick.kafka.topic_prefix}materialiser")
    finally:
        await admin.close()
    highest = ask(quick, "SELECT max(_offset) FROM rollout_events")[0][0]
    assert committed[TopicPartition(name, 0)] == (highest + 1, "")


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncGenerator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        yield
    finally:
        stop.set()
        await task


def _child() -> int:
    """The materialiser, which kills (or stops) itself after the first time it has done the step for `spans`."""
    what, _, step = sys.argv[1].rpartition(":")

    async def checkpoint(done: str, partition: Partition) -> None:
        if done == step and partition.topic is topics.SPANS:
            os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)

    settings = load_settings()
    return run_service("materialiser", settings.log, lambda stop: serve(settings, stop, checkpoint))


if __name__ == "__main__":
    sys.exit(_child())

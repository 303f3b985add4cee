"""Upgrades while producers publish: an older materialiser goes on, newer ones change tables and views beneath it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
from aiokafka import AIOKafkaProducer
from clickhouse_connect.driver.httpclient import HttpClient

import fulgurite.schemas
from fulgurite.consumers.redaction import apply_redaction, view_selects
from fulgurite.schemas import migrations as module
from fulgurite.schemas import topics
from fulgurite.schemas.migrations import Migration, apply_migrations, connection_options, migrations
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.settings import ENV_PREFIX, ClickHouseSettings, Settings
from tests.infra.dlq_world import World, span

QUICK = {"BATCH_WAIT_MS": "50", "INSERT_SECONDS": "4", "SESSION_SECONDS": "6"}


def newer_migrations() -> list[Migration]:
    """Two files of a version to come, which both change what fills `spans`."""
    first = f"SELECT *, toFloat64OrZero(attributes['cost']) AS cost FROM ({view_selects()['spans_mv']})"
    return [
        Migration(
            "0900_cost.sql",
            "ALTER TABLE spans ADD COLUMN IF NOT EXISTS cost Float64;\n"
            f"ALTER TABLE spans_mv MODIFY QUERY\n{first};\n"
            "CREATE OR REPLACE VIEW costs AS SELECT rollout_id, sum(cost) AS cost FROM spans GROUP BY rollout_id;\n",
        ),
        Migration(
            "0901_twice.sql",
            "ALTER TABLE spans ADD COLUMN IF NOT EXISTS twice Float64;\n"
            f"ALTER TABLE spans_mv MODIFY QUERY\nSELECT *, 2 * cost AS twice FROM ({first});\n"
            "CREATE OR REPLACE VIEW costs AS SELECT rollout_id, sum(twice) AS cost FROM spans GROUP BY rollout_id;\n",
        ),
    ]


@pytest.fixture
def newer(tmp_path: Path) -> str:
    """PYTHONPATH of the version to come: ours, with two more files of tables."""
    package = tmp_path / "newer" / "fulgurite" / "schemas"
    shutil.copytree(fulgurite.schemas.__path__[0], package, ignore=shutil.ignore_patterns("__pycache__"))
    for migration in newer_migrations():
        (package / "tables" / migration.name).write_text(migration.sql)
    return os.pathsep.join([str(tmp_path / "newer"), str(Path(__file__).parents[2])])


def ask(settings: ClickHouseSettings, sql: str) -> list[tuple[Any, ...]]:
    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        return [tuple(row) for row in client.query(sql).result_rows]


def insert(settings: ClickHouseSettings, name: str, **attributes: str) -> None:
    """As a materialiser of today does."""
    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        client.insert(
            "in_spans",
            [[span(span_id=name, attributes=attributes), "r", "spans", 0, 0, 0, 3]],
            column_names=["raw", "key", "_topic", "_partition", "_offset", "_index", "_into"],
        )


class Publishing:
    """One span after the other, until it is stopped; each says how dear it was."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._stop = asyncio.Event()
        self.count = 0

    async def run(self) -> None:
        name = self._world.name(topics.SPANS)
        async with AIOKafkaProducer(
            bootstrap_servers=self._world.settings.kafka.bootstrap_servers, acks="all", enable_idempotence=True
        ) as client:
            while not self._stop.is_set():
                value = span(span_id=f"{self.count:08d}", attributes={"cost": "1.5"})
                await client.send_and_wait(name, value, partition=self.count % 2)
                self.count += 1

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncGenerator[None]:
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            self._stop.set()
            await task


class Processes:
    """`fulgurite …` of either version."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._started: list[asyncio.subprocess.Process] = []

    async def start(self, command: str, python_path: str = "") -> asyncio.subprocess.Process:
        quick = {f"{ENV_PREFIX}MATERIALISER__{name}": value for name, value in QUICK.items()}
        path = {"PYTHONPATH": python_path} if python_path else {}
        number = len(self._started)
        with (self._world.data / f"{command}-{number}.log").open("wb") as log:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fulgurite.infra", command),
                env={**self._world.environment, **quick, **path},
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )
        self._started.append(child)
        return child

    async def stop(self) -> list[int]:
        """Exit codes of all of them."""
        for child in self._started:
            if child.returncode is None:
                child.terminate()
        return [await child.wait() for child in self._started]


@pytest.mark.slow
async def test_a_rolling_upgrade_under_load(settings: Settings, tmp_path: Path, newer: str) -> None:
    world = World(settings, tmp_path)
    processes, publishing = Processes(world), Publishing(world)
    names = [migration.name for migration in newer_migrations()]
    applied = f"SELECT uniqExact(name) FROM schema_migrations WHERE name IN {tuple(names)}"
    try:
        older = await processes.start("materialiser")
        async with publishing.going_on():
            await world.until("SELECT count() FROM spans", lambda rows: rows[0][0] > 0)
            # Two of the newer version at once, while only the older one inserts.
            both = [await processes.start("migrate", newer) for _ in range(2)]
            assert [await child.wait() for child in both] == [0, 0]
            assert world.ask(applied) == [(2,)]
            begin = publishing.count
            await world.until(f"SELECT count() FROM spans WHERE span_id > '{begin:08d}'", lambda rows: rows[0][0] > 25)
            # Then the newer version's materialisers join it, and it goes.
            for _ in range(2):
                await processes.start("materialiser", newer)
            others = "SELECT uniqExact(consumer) > 1 FROM ingest_log WHERE _topic LIKE '%spans'"
            await world.until(others, lambda rows: rows == [(1,)])
            assert older.returncode is None
            older.terminate()
            assert await older.wait() == 0
            end = publishing.count
            await world.until(f"SELECT count() FROM spans WHERE span_id > '{end:08d}'", lambda rows: rows[0][0] > 25)
        total = publishing.count
        await world.until("SELECT count() FROM spans", lambda rows: rows == [(total,)])
    finally:
        codes = await processes.stop()
    assert codes == [0] * 5
    assert world.ask("SELECT count(), uniqExact(span_id), min(span_id), max(span_id) FROM spans") == [
        (total, total, f"{0:08d}", f"{total - 1:08d}")
    ]
    assert world.ask("SELECT sum(rows), sum(dead), sum(duplicates), sum(gaps) FROM reconciliation") == [
        (total, 0, 0, 0)
    ]
    # What was read after the migration has the new columns, whoever inserted it; what was there before, their defaults.
    assert world.ask(f"SELECT DISTINCT cost, twice FROM spans WHERE span_id >= '{begin + 20:08d}'") == [(1.5, 3.0)]
    assert world.ask("SELECT DISTINCT cost, twice FROM spans WHERE span_id = '00000000'") == [(0.0, 0.0)]


_KILLED = """
import os, signal, sys
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.httpclient import HttpClient
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.settings import load_settings

left = int(sys.argv[1])

def counted(method):
    def run(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **options)
    return run

HttpClient.command, Client.insert = counted(HttpClient.command), counted(Client.insert)
apply_migrations(load_settings().clickhouse)
"""


@pytest.mark.slow
def test_killed_between_any_two_statements(settings: Settings, tmp_path: Path, newer: str) -> None:
    """kill -9 after each statement of two files, and after the last before it is recorded; then once to the end."""
    clickhouse = settings.clickhouse
    apply_migrations(clickhouse)
    world = World(settings, tmp_path)
    statements = sum(len(migration.statements) + 1 for migration in newer_migrations())
    codes: Iterator[int] = (
        subprocess.run(
            [sys.executable, "-c", _KILLED, str(done)], env={**world.environment, "PYTHONPATH": newer}, check=False
        ).returncode
        for done in itertools.count(2)  # two statements come before those of the files
    )
    killed = 0
    for code in codes:
        # Whatever is half done, what is inserted meanwhile is stored.
        insert(clickhouse, str(killed), cost="1.5")
        if code == 0:
            break
        assert code == -9
        killed += 1
    assert 3 <= killed <= statements
    found = ask(clickhouse, "SELECT span_id, cost, twice FROM spans ORDER BY toUInt32(span_id)")
    assert [row[0] for row in found] == [str(number) for number in range(killed + 1)]
    assert found[-1] == (str(killed), 1.5, 3.0)
    assert ask(clickhouse, "SELECT cost FROM costs") == [(sum(row[2] for row in found),)]
    names = {migration.name for migration in newer_migrations()}
    assert names <= {row[0] for row in ask(clickhouse, "SELECT name FROM schema_migrations")}


def test_a_view_is_never_set_back(clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was about to apply the first of two files goes on after another has applied both."""
    apply_migrations(clickhouse_settings)
    known = [*migrations(), *newer_migrations()]
    monkeypatch.setattr(module, "migrations", lambda: known)
    command = HttpClient.command
    seen: list[float] = []

    def slow(client: HttpClient, statement: str, *arguments: Any, **options: Any) -> Any:
        late = statement.startswith(("ALTER", "CREATE OR REPLACE"))
        if late:
            with monkeypatch.context() as other:
                other.setattr(HttpClient, "command", command)
                apply_migrations(clickhouse_settings)
        answer = command(client, statement, *arguments, **options)
        if late:
            insert(clickhouse_settings, str(len(seen)), cost="1.5")
            seen.append(ask(clickhouse_settings, "SELECT cost FROM costs")[0][0])
        return answer

    monkeypatch.setattr(HttpClient, "command", slow)
    apply_migrations(clickhouse_settings)
    assert len(seen) == 4  # both columns, the view and `costs` of the last file
    assert seen == [3.0 * (number + 1) for number in range(len(seen))]
    assert ask(clickhouse_settings, "SELECT DISTINCT cost, twice FROM spans") == [(1.5, 3.0)]


def test_a_migration_does_not_lift_redaction(
    clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the migration and the newer materialiser's start the rules that were in force go on being so."""
    apply_migrations(clickhouse_settings)
    rules = RedactionSettings.model_validate({"keys": [{"name": "password", "action": "mask"}]})
    with clickhouse_connect.get_client(
        **connection_options(clickhouse_settings), database=clickhouse_settings.database
    ) as client:
        apply_redaction(client, rules)
        known = [*migrations(), *newer_migrations()]
        monkeypatch.setattr(module, "migrations", lambda: known)
        assert apply_migrations(clickhouse_settings) == [migration.name for migration in newer_migrations()]
        insert(clickhouse_settings, "before", password="secret", cost="1.5")
        monkeypatch.setattr("fulgurite.consumers.redaction.migrations", lambda: known)
        assert apply_redaction(client, rules) == ["spans_mv"]
        insert(clickhouse_settings, "after", password="secret", cost="1.5")
        apply_redaction(client, RedactionSettings())
        insert(clickhouse_settings, "without", password="secret", cost="1.5")
    assert ask(clickhouse_settings, "SELECT span_id, attributes['password'], twice FROM spans ORDER BY span_id") == [
        ("after", "[redacted]", 3.0),
        ("before", "[redacted]", 0.0),
        ("without", "secret", 3.0),
    ]

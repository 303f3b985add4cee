"""Migrations: files in order, idempotent, refusing changed files; columns are the fields of the events."""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
import sys
from typing import Any

import clickhouse_connect
import pytest
from pydantic import BaseModel

from fulgurite.schemas import migrations as module
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.migrations import Migration, apply_migrations, connection_options, migrations
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import (
    AttemptFinished,
    AttemptHeartbeat,
    AttemptStarted,
    RolloutCancelled,
    RolloutFinished,
    RolloutQueued,
    RolloutRequeued,
)
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.training import RolloutsDecided, RunFinished, RunStarted, TrainingStep, VersionApplied
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.schemas.workers import WorkerHeartbeat

TABLES: dict[str, list[type[BaseModel]]] = {
    "spans": [Span],
    "rewards": [Reward],
    "rollout_events": [
        RolloutQueued,
        AttemptStarted,
        AttemptHeartbeat,
        AttemptFinished,
        RolloutRequeued,
        RolloutCancelled,
        RolloutFinished,
    ],
    "trajectories": [Trajectory],
    "resources": [ResourceVersion],
    "training_events": [RunStarted, TrainingStep, RolloutsDecided, VersionApplied, RunFinished],
    "worker_heartbeats": [WorkerHeartbeat],
}


REPEATABLE = (
    r"CREATE (TABLE|VIEW|MATERIALIZED VIEW) IF NOT EXISTS |CREATE OR REPLACE VIEW "
    r"|ALTER TABLE \w+ (ADD (COLUMN|INDEX) IF NOT EXISTS|MATERIALIZE INDEX|MODIFY (QUERY|SETTING|COLUMN))\s"
)


def ask(settings: ClickHouseSettings, sql: str) -> list[tuple[Any, ...]]:
    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        return [tuple(row) for row in client.query(sql).result_rows]


def test_applied_in_order_once(clickhouse_settings: ClickHouseSettings) -> None:
    names = [migration.name for migration in migrations()]
    assert names == sorted(names)
    assert len({name.split("_")[0] for name in names}) == len(names), "two with one number have no order"
    assert apply_migrations(clickhouse_settings) == names
    assert apply_migrations(clickhouse_settings) == []
    assert [row[0] for row in ask(clickhouse_settings, "SELECT name FROM schema_migrations ORDER BY name")] == names
    assert ask(clickhouse_settings, "SELECT engine FROM system.databases WHERE name = currentDatabase()") == [
        ("Atomic",)
    ]


def test_the_database_is_made(clickhouse_settings: ClickHouseSettings) -> None:
    fresh = clickhouse_settings.model_copy(update={"database": f"{clickhouse_settings.database}_fresh"})
    assert apply_migrations(fresh)
    ask(clickhouse_settings, f"DROP DATABASE {fresh.database} SYNC")


def test_columns_are_the_fields_of_the_events(clickhouse_settings: ClickHouseSettings) -> None:
    apply_migrations(clickhouse_settings)
    for table, events in TABLES.items():
        rows = ask(
            clickhouse_settings,
            f"SELECT name FROM system.columns WHERE database = currentDatabase() AND table = '{table}'",
        )
        columns = {row[0] for row in rows}
        fields = {field for event in events for field in event.model_fields}
        assert fields <= columns, table
        assert {"extra", "_topic", "_partition", "_offset", "_ts", "_ingested"} <= columns, table


def test_every_view_can_be_asked(clickhouse_settings: ClickHouseSettings) -> None:
    apply_migrations(clickhouse_settings)
    views = ask(
        clickhouse_settings, "SELECT name FROM system.tables WHERE database = currentDatabase() AND engine = 'View'"
    )
    assert len(views) >= 12
    for (view,) in views:
        for profile in ("", " SETTINGS join_use_nulls = 1"):
            assert ask(clickhouse_settings, f"SELECT * FROM {view}{profile}") == []


def test_every_table_that_keeps_records_refuses_a_second_insert(clickhouse_settings: ClickHouseSettings) -> None:
    apply_migrations(clickhouse_settings)
    rows = ask(
        clickhouse_settings,
        "SELECT name, engine_full FROM system.tables WHERE database = currentDatabase() AND engine LIKE '%MergeTree' "
        "AND name NOT IN ('schema_migrations', 'ingest_log', 'ingest_fences')",
    )
    assert {row[0] for row in rows} == {*TABLES, "dead_letters", "dead_letter_actions", "replay_log"}
    assert all("non_replicated_deduplication_window" in row[1] for row in rows)


def test_a_changed_file_is_refused(clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_migrations(clickhouse_settings)
    changed = [Migration(m.name, m.sql + "-- a word more\n") if "rewards" in m.name else m for m in migrations()]
    monkeypatch.setattr(module, "migrations", lambda: changed)
    with pytest.raises(StartError, match=r"0003_rewards\.sql was changed after it was applied"):
        apply_migrations(clickhouse_settings)


def test_a_newer_database_is_refused(clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_migrations(clickhouse_settings)
    *older, newest = migrations()
    monkeypatch.setattr(module, "migrations", lambda: older)
    with pytest.raises(StartError, match=rf"{newest.name}.*newer version"):
        apply_migrations(clickhouse_settings)


def test_a_crash_in_the_middle_of_a_file_is_completed(clickhouse_settings: ClickHouseSettings) -> None:
    first = migrations()[0]
    ask(clickhouse_settings, first.statements[0])
    assert first.name in apply_migrations(clickhouse_settings)


def test_two_at_once(clickhouse_settings: ClickHouseSettings) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(apply_migrations, [clickhouse_settings] * 2))
    assert apply_migrations(clickhouse_settings) == []


def test_statements_can_be_repeated() -> None:
    for migration in migrations():
        for statement in migration.statements:
            assert re.match(REPEATABLE, statement), statement[:80]


def test_dead_letters_of_before_have_their_line(
    clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = [migration for migration in migrations() if migration.name < "0015"]
    with monkeypatch.context() as before:
        before.setattr(module, "migrations", lambda: older)
        apply_migrations(clickhouse_settings)
    # As a materialiser of before writes them; one that still runs goes on doing so.
    own = (
        "INSERT INTO dead_letters (topic, partition, offset, stage, _index, _topic, _partition, _offset) "
        "VALUES ('t.spans', 0, {at}, 'materialiser', 7, 't.spans', 0, {at})"
    )
    place = {"topic": "t.spans", "partition": "0", "offset": "5"}
    headers = {f"__connect.errors.{name}": text for name, text in place.items()}
    sent = f"INSERT INTO in_dead_letters (raw, headers, _topic, _offset) VALUES ('x', {headers}, 'd', {{at}})"
    for sql in (own, sent):
        ask(clickhouse_settings, sql.replace("{at}", "1"))
    assert apply_migrations(clickhouse_settings)[0] == "0015_dead_letter_lines.sql"
    for sql in (own, sent):
        ask(clickhouse_settings, sql.replace("{at}", "2"))
    rows = ask(clickhouse_settings, "SELECT offset, _offset, line, _index FROM dead_letters ORDER BY offset, _offset")
    assert rows == [(1, 1, 7, 7), (2, 2, 7, 7), (5, 1, 0, 0), (5, 2, 0, 0)]


def test_schemas_stay_light() -> None:
    code = "import sys, fulgurite.schemas.migrations; print([m for m in sys.modules if m.startswith('clickhouse')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )

"""Retention and power loss: what is altered and when not, and that the real engine drops and flushes."""

from __future__ import annotations

import time
from collections.abc import Generator

import clickhouse_connect
import pytest
from clickhouse_connect.driver import Client

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.retention import RetentionSettings
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.storage import TIMES, Table, apply_storage, storage_statements

FOR_EVER = RetentionSettings(worker_heartbeats_days=0)
SINCE = "toDateTime(if(_ts > toDateTime64(0, 3), least(_ts, _ingested), _ingested))"
MONTHS = "MergeTree PARTITION BY toYYYYMM(_ts) ORDER BY rollout_id"


@pytest.fixture
def client(migrated_settings: ClickHouseSettings) -> Generator[Client]:
    options = connection_options(migrated_settings)
    with clickhouse_connect.get_client(**options, database=migrated_settings.database) as found:
        yield found


def table(engine_full: str, name: str = "spans", partition_key: str = "toYYYYMM(_ts)") -> Table:
    return Table(name, engine_full, partition_key)


def test_only_what_differs_is_altered() -> None:
    thirty = RetentionSettings(spans_days=30)
    bare = table(f"{MONTHS} SETTINGS index_granularity = 8192")
    assert storage_statements([bare], thirty, fsync=False) == [
        "ALTER TABLE spans MODIFY SETTING ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1",
        f"ALTER TABLE spans MODIFY TTL {SINCE} + toIntervalDay(30)",
    ]
    done = table(
        f"{MONTHS} TTL {SINCE} + toIntervalDay(30) SETTINGS index_granularity = 8192, "
        "ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1"
    )
    assert storage_statements([done], thirty, fsync=False) == []
    assert storage_statements([done], RetentionSettings(spans_days=90), fsync=False) == [
        f"ALTER TABLE spans MODIFY TTL {SINCE} + toIntervalDay(90)"
    ]
    assert storage_statements([done], RetentionSettings(), fsync=False) == ["ALTER TABLE spans REMOVE TTL"]


def test_the_form_of_before_is_replaced() -> None:
    before = table(
        f"{MONTHS} TTL toDateTime(_ts) + toIntervalDay(30) SETTINGS index_granularity = 8192, "
        "ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1"
    )
    assert storage_statements([before], RetentionSettings(spans_days=30), fsync=False) == [
        f"ALTER TABLE spans MODIFY TTL {SINCE} + toIntervalDay(30)"
    ]
    assert storage_statements([before], RetentionSettings(), fsync=False) == ["ALTER TABLE spans REMOVE TTL"]


def test_a_table_without_partitions_loses_rows_and_not_parts() -> None:
    letters = table("MergeTree ORDER BY _offset", "dead_letters", "")
    assert storage_statements([letters], RetentionSettings(dead_letters_days=365), fsync=False) == [
        f"ALTER TABLE dead_letters MODIFY TTL {SINCE} + toIntervalDay(365)"
    ]


def test_somebody_elses_ttl_is_not_replaced() -> None:
    tiered = table(
        f"{MONTHS} TTL toDateTime(_ts) + toIntervalDay(7) TO VOLUME 'cold' SETTINGS index_granularity = 8192"
    )
    assert storage_statements([tiered], RetentionSettings(), fsync=False) == []
    with pytest.raises(StartError, match=r"retention\.spans_days is 30, but .* TO VOLUME 'cold'.*REMOVE TTL"):
        storage_statements([tiered], RetentionSettings(spans_days=30), fsync=False)


def test_a_fresh_database_needs_nothing(client: Client) -> None:
    assert apply_storage(client, RetentionSettings(), fsync=False) == []


def test_everything_can_be_set_and_taken_back(client: Client) -> None:
    all_of_it = RetentionSettings.model_validate({f"{name}_days": 3 for name in TIMES})
    assert len(apply_storage(client, all_of_it, fsync=True)) > len(TIMES)
    assert apply_storage(client, all_of_it, fsync=True) == []
    kept = "database = currentDatabase() AND engine = 'MergeTree'"
    unsafe = client.query(
        f"SELECT name FROM system.tables WHERE {kept} AND engine_full NOT LIKE '%fsync_after_insert = 1%'"
    )
    assert unsafe.result_rows == []
    with_ttl = client.query(f"SELECT name FROM system.tables WHERE {kept} AND engine_full LIKE '% TTL %'").result_rows
    assert {row[0] for row in with_ttl} == set(TIMES)
    apply_storage(client, FOR_EVER, fsync=False)
    assert apply_storage(client, FOR_EVER, fsync=False) == []
    rows = client.query(
        f"SELECT name FROM system.tables WHERE {kept} AND match(engine_full, ' TTL |fsync_')"
    ).result_rows
    assert rows == []


def test_whole_parts_are_dropped(client: Client) -> None:
    """Rows of months ago, written before and after there is a retention; this month's stay."""
    insert_reward(client, "old", days_ago=100)
    insert_reward(client, "new", days_ago=0)
    client.command("ALTER TABLE rewards MODIFY SETTING merge_with_ttl_timeout = 0")
    assert count(client) == 2
    apply_storage(client, RetentionSettings(rewards_days=30), fsync=False)
    insert_reward(client, "old, too", days_ago=90)
    until(client, 1)
    assert client.query("SELECT rollout_id FROM rewards").result_rows == [("new",)]
    assert parts(client) == 1


def test_a_part_with_one_row_that_is_young_enough_stays(client: Client) -> None:
    client.command("ALTER TABLE rewards MODIFY SETTING merge_with_ttl_timeout = 0")
    apply_storage(client, RetentionSettings(rewards_days=30), fsync=False)
    client.command(
        "INSERT INTO rewards (rollout_id, _ts) SELECT 'r', now64(3) - number FROM numbers(1) "
        "UNION ALL SELECT 'month', toStartOfMonth(now()) UNION ALL SELECT 'r', now64(3)"
    )
    client.command("OPTIMIZE TABLE rewards FINAL")
    assert count(client) == 3


def test_a_kafka_time_that_cannot_be_counts_from_the_insert(client: Client) -> None:
    """Beyond 2106, where ClickHouse's seconds end, in microseconds, or none: kept as long as any other row."""
    client.command("ALTER TABLE rewards MODIFY SETTING merge_with_ttl_timeout = 0")
    apply_storage(client, RetentionSettings(rewards_days=30), fsync=False)
    times_ms = (4_330_000_000_000, 5_680_000_000_000, 1_790_000_000_000_000, 0, -1, -2_000_000_000_000)
    row = "'{}', fromUnixTimestamp64Milli(toInt64({}), 'UTC'), now64(3) - INTERVAL {} DAY"
    for ingested_days_ago, name in ((0, "new"), (40, "old")):
        rows = " UNION ALL SELECT ".join(row.format(name, time_ms, ingested_days_ago) for time_ms in times_ms)
        client.command(f"INSERT INTO rewards (rollout_id, _ts, _ingested) SELECT {rows}")
    until(client, len(times_ms))
    client.command("OPTIMIZE TABLE rewards FINAL")
    found = client.query("SELECT rollout_id, count() FROM rewards GROUP BY ALL").result_rows
    assert found == [("new", len(times_ms))]


def test_inserts_are_flushed(client: Client) -> None:
    insert_reward(client, "r", days_ago=0)
    before = flushed(client)
    insert_reward(client, "r", days_ago=0)
    assert flushed(client) == before
    apply_storage(client, RetentionSettings(), fsync=True)
    before = flushed(client)  # altering flushes, too
    insert_reward(client, "r", days_ago=0)
    assert flushed(client) > before


def insert_reward(client: Client, rollout_id: str, days_ago: int) -> None:
    client.command(f"INSERT INTO rewards (rollout_id, _ts) SELECT '{rollout_id}', now64(3) - INTERVAL {days_ago} DAY")


def count(client: Client) -> int:
    return client.query("SELECT count() FROM rewards").result_rows[0][0]


def parts(client: Client) -> int:
    where = "database = currentDatabase() AND table = 'rewards' AND active AND rows > 0"
    return client.query(f"SELECT count() FROM system.parts WHERE {where}").result_rows[0][0]


def flushed(client: Client) -> int:
    rows = client.query("SELECT sum(value) FROM system.events WHERE event IN ('FileSync', 'DirectorySync')").result_rows
    return rows[0][0]


def until(client: Client, rows: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while count(client) != rows:
        assert time.monotonic() < deadline, f"rewards has {count(client)} rows, not {rows}"
        time.sleep(0.1)

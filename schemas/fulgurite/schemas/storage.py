"""How the tables are kept: for how long, and whether a power failure may take what was acknowledged.

No migration, because these are settings, which change: `apply_storage` reads what each table has and alters what
differs. Promises: the same settings again alter nothing; a TTL of another form than the one made here is somebody's own
and never replaced; tables of months drop whole parts and rewrite nothing. Two processes at once do no harm.

What the materialiser's contract needs is never dropped: it resumes behind the highest `hi` of `ingest_log`, so rows
below may go without being read again. `ingest_log` itself has no retention: a partition without an entry would be read
from its beginning. It gets a row a second and busy partition, of 4.4 bytes on disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.retention import RetentionSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

logger = logging.getLogger(__name__)

TIMES: Mapping[str, str] = {
    "spans": "_ts",
    "rewards": "_ts",
    "rollout_events": "_ts",
    "trajectories": "_ts",
    "training_events": "_ts",
    "dead_letters": "_ts",
    "worker_heartbeats": "_ingested",
}
"""What has a retention, and from which time it is counted."""

_KNOWN = "if(_ts > toDateTime64(0, 3), least(_ts, _ingested), _ingested)"
"""Kafka's time, as its producer said. One after the insert, or none (0, -1), is no time to count from: seconds begin
again at 1970 in 2106, and the rows would be gone at once."""

_OURS = re.compile(rf"toDateTime\((?:{re.escape(_KNOWN)}|_ts|_ingested)\) \+ toIntervalDay\(\d+\)")
"""Of an older version, too."""

_WHOLE_PARTS: Mapping[str, str] = {
    "ttl_only_drop_parts": "1",
    # For parts that are there already: note when their rows expire, and do not rewrite them.
    "materialize_ttl_recalculate_only": "1",
}

_FSYNC: Mapping[str, str] = {
    "fsync_after_insert": "1",
    "fsync_part_directory": "1",
    # A merged part replaces parts that were safe.
    "min_rows_to_fsync_after_merge": "1",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A MergeTree table as it is: `engine_full` and `partition_key` of system.tables."""

    name: str
    engine_full: str
    partition_key: str

    @property
    def ttl(self) -> str:
        """As ClickHouse writes it; empty where there is none."""
        found = re.search(r" TTL (.+?)(?: SETTINGS |$)", self.engine_full)
        return found[1] if found else ""

    @property
    def settings(self) -> Mapping[str, str]:
        """Its own, by name."""
        _, _, text = self.engine_full.partition(" SETTINGS ")
        return dict(re.findall(r"(\w+) = ([^,]+)", text))


def storage_statements(tables: Iterable[Table], retention: RetentionSettings, fsync: bool) -> list[str]:
    """What must be altered for the tables to be as the settings say. Raises StartError for a TTL of another form."""
    statements: list[str] = []
    for table in tables:
        statements += _retention_statements(table, retention)
        statements += _settings_statements(table, _FSYNC) if fsync else _reset_statements(table, _FSYNC)
    return statements


def _retention_statements(table: Table, retention: RetentionSettings) -> list[str]:
    time = TIMES.get(table.name)
    if time is None:
        return []
    name = f"{table.name}_days"
    days: int = getattr(retention, name)
    since = _KNOWN if time == "_ts" else time
    wanted = f"toDateTime({since}) + toIntervalDay({days})" if days else ""
    if table.ttl == wanted:
        return []
    if table.ttl and not _OURS.fullmatch(table.ttl):
        if not days:
            return []
        raise StartError(
            f"retention.{name} is {days}, but the table {table.name} has a TTL of its own ({table.ttl}): set "
            f"retention.{name} to 0, or remove that TTL (ALTER TABLE {table.name} REMOVE TTL)"
        )
    if not wanted:
        return [f"ALTER TABLE {table.name} REMOVE TTL"]
    # A table without partitions is one part in the end, which would never expire as a whole: its rows do.
    whole = _settings_statements(table, _WHOLE_PARTS) if table.partition_key else []
    return [*whole, f"ALTER TABLE {table.name} MODIFY TTL {wanted}"]


def _settings_statements(table: Table, wanted: Mapping[str, str]) -> list[str]:
    different = [f"{name} = {value}" for name, value in wanted.items() if table.settings.get(name) != value]
    return [f"ALTER TABLE {table.name} MODIFY SETTING {', '.join(different)}"] if different else []


def _reset_statements(table: Table, unwanted: Mapping[str, str]) -> list[str]:
    there = [name for name in unwanted if name in table.settings]
    return [f"ALTER TABLE {table.name} RESET SETTING {', '.join(there)}"] if there else []


def apply_storage(client: Client, retention: RetentionSettings, fsync: bool) -> list[str]:
    """Makes the tables of the client's database as the settings say; returns what was altered. After the migrations."""
    rows = client.query(
        "SELECT name, engine_full, partition_key FROM system.tables "
        "WHERE database = currentDatabase() AND engine LIKE '%MergeTree' AND name NOT LIKE '.inner%' ORDER BY name"
    ).result_rows
    tables = [Table(str(name), str(engine), str(key)) for name, engine, key in rows]
    statements = storage_statements(tables, retention, fsync)
    for statement in statements:
        client.command(statement)
        logger.info("%s", statement)
    return statements

"""Both embedded stores on one data folder, supervised, with topics and tables: what `up` and the demo start from.

<data>/kafka, <data>/clickhouse    their data, and the passwords without which nobody connects
       fulgurite.toml              how every command finds them
       run/lock                    one owner of the folder at a time
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.folder_lock import FolderLock
from fulgurite.infra.java import kafka_jars
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.kafka_probe import run_in_thread
from fulgurite.infra.kafka_security import BrokerSecurity
from fulgurite.infra.settings_file import stored_password, write_settings_file
from fulgurite.infra.sql import clickhouse_errors
from fulgurite.infra.supervisor import Supervisor
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.settings import Settings

MIN_FREE_BYTES = 256 * 1024 * 1024
"""Their logs, tables and libraries take about 100 MiB before the first record."""

Report = Callable[[str], None]
"""Told each step, in a sentence."""


@dataclass(frozen=True, slots=True)
class Stores:
    """The running stores; `settings` are the given ones with their addresses."""

    kafka: EmbeddedKafka
    clickhouse: EmbeddedClickHouse
    settings: Settings
    settings_file: Path


def hold_folder(data: Path, who: str) -> FolderLock:
    """Makes `who` the folder's one owner until close() or its end. Raises StartError naming who holds it."""
    return FolderLock(data / "run", who)


def start_stores(data: Path, settings: Settings, supervisor: Supervisor, report: Report) -> Stores:
    """Starts both, hands them to the supervisor, creates topics and tables, writes fulgurite.toml. Raises StartError.

    The caller holds the folder. Whatever was started is the supervisor's to stop, also when this raises.
    """
    _check_room(data)
    kafka_jars()  # may download: before anything runs
    security = BrokerSecurity(stored_password(data / "kafka" / "password"))
    kafka = EmbeddedKafka(data / "kafka", security=security, fsync=settings.kafka.fsync)
    clickhouse = EmbeddedClickHouse(data / "clickhouse", readable_database=settings.clickhouse.database)
    with ThreadPoolExecutor(2, thread_name_prefix="start-store") as pool:
        starts = {
            "kafka": pool.submit(_start, supervisor, "kafka", kafka),
            "clickhouse": pool.submit(_start, supervisor, "clickhouse", clickhouse),
        }
    for start in starts.values():
        start.result()
    report(f"Kafka answers at {kafka.bootstrap_servers}, ClickHouse at {clickhouse.url}")
    report(f"other Kafka clients log in by {kafka.folder / 'client.properties'} (Java) or kcat.conf beside it")
    found = settings.model_copy(
        update={
            "kafka": kafka.settings(settings.kafka),
            "clickhouse": clickhouse.settings(settings.clickhouse.database),
        }
    )
    topics = run_in_thread(create_topics(found.kafka))
    report(f"created {len(topics)} topics" if topics else "all topics exist")
    with clickhouse_errors(found.clickhouse):
        applied = apply_migrations(found.clickhouse)
    report(f"applied {len(applied)} migrations" if applied else "all tables exist")
    path = write_settings_file(data, found.kafka, found.clickhouse)
    return Stores(kafka, clickhouse, found, path)


def _check_room(data: Path) -> None:
    """A disk that fills while they create their files leaves half of them; nothing is begun on one that will."""
    free = shutil.disk_usage(data).free
    if free < MIN_FREE_BYTES:
        raise StartError(
            f"{data} has {free >> 20} MiB free and the stores need {MIN_FREE_BYTES >> 20}: free some space or choose "
            "another folder with --data"
        )


def _start(supervisor: Supervisor, name: str, store: EmbeddedKafka | EmbeddedClickHouse) -> None:
    store.start()
    supervisor.watch(name, store)

"""Fixtures of all tests: one real Kafka and one real ClickHouse a session, a namespace of its own for every test.

A test that stops or kills a store starts one of its own: EmbeddedKafka(tmp_path), EmbeddedClickHouse(tmp_path).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings as hypothesis_settings

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.kafka_probe import run_in_thread
from fulgurite.infra.topics import create_topics, delete_topics
from fulgurite.schemas.settings import ClickHouseSettings, KafkaSettings, Settings
from tests import broker_cache, orphans
from tests.databases import Databases

# A busy machine stops a test for longer than any deadline of an example.
hypothesis_settings.register_profile("fulgurite", deadline=None)
hypothesis_settings.load_profile("fulgurite")


# What a developer set, or a demo left in the working directory, is no part of a test, nor of the processes it starts.
HOME = tempfile.mkdtemp(prefix="fulgurite-tests-")
for name in [name for name in os.environ if name.startswith("FULGURITE_")]:
    del os.environ[name]
os.environ["FULGURITE_HOME"] = HOME
orphans.watch(HOME)
broker_cache.use()
BROKER_CACHE = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_configure(config: pytest.Config) -> None:
    of_all_workers = config.getoption("numprocesses", None)
    if of_all_workers and (process := broker_cache.make_beside()) is not None:
        config.stash[BROKER_CACHE] = process


def pytest_unconfigure(config: pytest.Config) -> None:
    if (process := config.stash.get(BROKER_CACHE, None)) is not None:
        process.terminate()
        process.wait()
    shutil.rmtree(HOME, ignore_errors=True)
    orphans.stop()


LONGEST = (
    "end_to_end/test_demo.py",
    "chaos/",
    "streams/test_trainer_ranks.py",
    "learners/test_engines.py",
    "streams/test_trainer_kills.py",
    "learners/test_objectives_on_ranks.py",
)
"""Files that take minutes begin first: the last one would otherwise run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place for place, name in enumerate(LONGEST) if name in path), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """The session's broker."""
    with EmbeddedKafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedClickHouse]:
    """The session's engine."""
    with EmbeddedClickHouse(tmp_path_factory.mktemp("clickhouse")) as server:
        yield server


@pytest.fixture
def kafka_settings(kafka_server: EmbeddedKafka) -> Iterator[KafkaSettings]:
    """The session's broker with topics of this test's own, 2 partitions."""
    prefix = f"test{secrets.token_hex(4)}."
    settings = KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers,
        topic_prefix=prefix,
        otlp_topic=f"{prefix}otlp_spans",
        partitions=2,
    )
    run_in_thread(create_topics(settings))
    yield settings
    run_in_thread(delete_topics(settings))


@pytest.fixture
def clickhouse_settings(clickhouse_server: EmbeddedClickHouse) -> Iterator[ClickHouseSettings]:
    """The session's engine with an empty database of this test's own (migrations not applied)."""
    settings = clickhouse_server.settings(database=f"test_{secrets.token_hex(4)}")
    clickhouse_server.command(f"CREATE DATABASE {settings.database} ENGINE = Atomic")
    yield settings
    clickhouse_server.command(f"DROP DATABASE IF EXISTS {settings.database} SYNC")


@pytest.fixture(scope="session")
def databases(clickhouse_server: EmbeddedClickHouse) -> Databases:
    return Databases(clickhouse_server)


@pytest.fixture
def migrated_settings(databases: Databases) -> Iterator[ClickHouseSettings]:
    """The session's engine with a database of this test's own, with all tables, empty."""
    settings = databases.take()
    yield settings
    databases.give_back(settings)


@pytest.fixture
def settings(kafka_settings: KafkaSettings, migrated_settings: ClickHouseSettings) -> Settings:
    """Both stores, with all tables; other sections as by default."""
    return Settings(kafka=kafka_settings, clickhouse=migrated_settings)

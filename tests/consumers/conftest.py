"""Fixtures of the tests of consumers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import clickhouse_connect
import pytest

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.schemas.migrations import apply_migrations, connection_options
from tests.consumers.otlp_tables import Tables


@pytest.fixture(scope="module")
def module_tables(clickhouse_server: EmbeddedClickHouse) -> Iterator[Tables]:
    """Of a database with all tables: they take longer to make than a test to run."""
    settings = clickhouse_server.settings(database=f"test_{secrets.token_hex(4)}")
    apply_migrations(settings)
    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        yield Tables(client, settings)
    clickhouse_server.command(f"DROP DATABASE {settings.database} SYNC")


@pytest.fixture
def tables(module_tables: Tables) -> Tables:
    """The module's, empty."""
    for table in ("spans", "dead_letters"):
        module_tables.client.command(f"TRUNCATE TABLE {table}")
    return module_tables

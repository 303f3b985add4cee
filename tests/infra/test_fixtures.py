"""The fixtures give what the other tests rely on."""

from __future__ import annotations

import clickhouse_connect

from fulgurite.schemas.settings import Settings


def test_every_test_has_empty_tables_and_its_own_topics(settings: Settings) -> None:
    store = settings.clickhouse
    client = clickhouse_connect.get_client(
        dsn=store.url, username=store.user, password=store.password.get_secret_value(), database=store.database
    )
    try:
        counts = client.query(
            "SELECT name, total_rows FROM system.tables WHERE database = currentDatabase()"
        ).result_rows
        assert {name for name, rows in counts if rows} == {"schema_migrations"}
        assert client.query("SELECT currentDatabase()").result_rows == [(store.database,)]
    finally:
        client.close()
    assert settings.kafka.topic_prefix.startswith("test")

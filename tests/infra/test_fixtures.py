"""The fixtures give what the other tests rely on."""

from __future__ import annotations

import clickhouse_connect

from fulgurite.schemas.settings import Settings


def test_every_test_has_an_empty_database_and_its_own_topics(settings: Settings) -> None:
    store = settings.clickhouse
    client = clickhouse_connect.get_client(
        dsn=store.url, username=store.user, password=store.password.get_secret_value(), database=store.database
    )
    try:
        assert client.query("SHOW TABLES").result_rows == []
        assert client.query("SELECT currentDatabase()").result_rows == [(store.database,)]
    finally:
        client.close()
    assert settings.kafka.topic_prefix.startswith("test")

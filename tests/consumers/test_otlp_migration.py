"""0014_otlp.sql replaces two views one after the other under a running materialiser: no span is read wrongly."""

from __future__ import annotations

import clickhouse_connect
import pytest

from fulgurite.schemas import migrations as module
from fulgurite.schemas.migrations import apply_migrations, connection_options, migrations
from fulgurite.schemas.settings import ClickHouseSettings
from tests.consumers.otlp_encoding import Record, record, span
from tests.consumers.otlp_tables import Tables

OLD = {"llm.model_name": "m", "gen_ai.prompt": "in", "gen_ai.completion": "out", "gen_ai.agent.name": "a"}
NEW = {"llm.response.model_name": "m", "gen_ai.retrieval.query.text": "in", "gen_ai.retrieval.documents": "out"}


def test_spans_between_the_two_statements_are_read_as_before(
    clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = migrations()
    (own,) = [migration for migration in known if migration.name.startswith("0014")]
    with monkeypatch.context() as before:
        before.setattr(module, "migrations", lambda: [one for one in known if one.name < own.name])
        apply_migrations(clickhouse_settings)
    options = connection_options(clickhouse_settings)
    with clickhouse_connect.get_client(**options, database=clickhouse_settings.database) as client:
        tables = Tables(client, clickhouse_settings)
        value = record(span(OLD), span(NEW), span(span_id=b""))
        for at, statement in enumerate(["SELECT 1", *own.statements]):
            client.command(statement)
            tables.insert([Record(at, value)])
        found = "SELECT model, input, output, count() FROM spans WHERE _index = {index} GROUP BY ALL ORDER BY model"
        count = len(own.statements) + 1
        assert client.query(found.replace("{index}", "0")).result_rows == [("m", "in", "out", count)]
        # Before both views are replaced the new names have no meaning; none is taken for another.
        assert client.query(found.replace("{index}", "1")).result_rows == [
            ("", "", "", 2),
            ("m", "in", "out", count - 2),
        ]
        dead = client.query("SELECT count(), countDistinct(message) FROM dead_letters").result_rows
        assert dead == [(count, 1)]
    assert own.name in apply_migrations(clickhouse_settings)

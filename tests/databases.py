"""Databases with all tables, one to a test and used again: making one takes the engine ten times what emptying it does.

Given back, a database is emptied if its tables and views are as they were made; if a test changed any, it is dropped.
"""

from __future__ import annotations

import json
import secrets

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.settings import ClickHouseSettings

_KEPT = "schema_migrations"


class Databases:
    def __init__(self, server: EmbeddedClickHouse) -> None:
        self._server = server
        self._free: list[ClickHouseSettings] = []
        self._made: dict[str, object] = {}

    def take(self) -> ClickHouseSettings:
        return self._free.pop() if self._free else self._make()

    def give_back(self, settings: ClickHouseSettings) -> None:
        name = settings.database
        if self._definitions(name) != self._made[name]:
            self._server.command(f"DROP DATABASE IF EXISTS {name} SYNC")
            return
        for (table,) in self._ask(f"SELECT name FROM system.tables WHERE database = '{name}' AND total_rows > 0"):
            if table != _KEPT:
                self._server.command(f"TRUNCATE TABLE {name}.`{table}`")
        self._free.append(settings)

    def _make(self) -> ClickHouseSettings:
        settings = self._server.settings(database=f"test_{secrets.token_hex(4)}")
        apply_migrations(settings)
        self._made[settings.database] = self._definitions(settings.database)
        return settings

    def _definitions(self, name: str) -> list[list[str]]:
        """With the comments: redaction's rules are in a view's."""
        columns = "name, create_table_query"
        return self._ask(f"SELECT {columns} FROM system.tables WHERE database = '{name}' ORDER BY name")

    def _ask(self, sql: str) -> list[list[str]]:
        return json.loads(self._server.command(f"{sql} FORMAT JSONCompact"))["data"]

"""A database for tests of OTLP: records through the materialiser's own insert, and the rows they became."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from clickhouse_connect.driver import Client

from fulgurite.consumers.materialiser.blocks import BOTH_TABLES, Partition, Slice
from fulgurite.consumers.materialiser.fences import Guard
from fulgurite.consumers.materialiser.store import Store
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import OTLP_SPANS
from tests.consumers.otlp_encoding import Record


class Tables:
    """The tables of one test."""

    def __init__(self, client: Client, settings: ClickHouseSettings) -> None:
        self.client = client
        self.settings = settings
        self._offset = 0

    def insert(self, records: Sequence[Record], token: str = "", into: int = BOTH_TABLES) -> None:
        """`token`: as a replay inserts, once. Raises Unreadable or Rejected."""
        asyncio.run(self._insert(records, token or secrets.token_hex(8), into))

    async def _insert(self, records: Sequence[Record], token: str, into: int) -> None:
        store = Store(self.settings, 30, "test")
        await store.connect()
        try:
            present = {record.offset: BOTH_TABLES & ~into for record in records}
            slices = [Slice(Partition(OTLP_SPANS, "otlp_spans", 0), records, present)]
            await store.insert(slices, Guard("test", settings={"insert_deduplication_token": token}))
        finally:
            await store.close()

    def row(self, value: bytes) -> dict[str, Any]:
        """The row of a record with one span."""
        self._offset += 1
        self.insert([Record(self._offset, value)])
        (row,) = self.rows("spans", f"_offset = {self._offset}")
        return row

    def rows(self, table: str, where: str = "1") -> list[dict[str, Any]]:
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY _offset, _index"
        return list(self.client.query(query).named_results())

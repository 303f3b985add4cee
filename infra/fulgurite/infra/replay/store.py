"""What a replay asks ClickHouse beyond what the materialiser does: ranges with an end, rows by their age, deletes.

Promises and errors as in the materialiser's store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from clickhouse_connect.driver.exceptions import ClickHouseError

from fulgurite.consumers.materialiser.blocks import DEAD_LETTERS_TABLE, OWN_TABLE, Partition, Record, Slice
from fulgurite.consumers.materialiser.errors import Unavailable
from fulgurite.consumers.materialiser.fences import Guard
from fulgurite.consumers.materialiser.store import TABLES, Store
from fulgurite.producers.raw import Undecodable

DEAD_LETTERS = "dead_letters"
QUIET_SECONDS = 0.1

_RANGE = "_topic = {name:String} AND _partition = {number:UInt32} AND _offset >= {lo:UInt64} AND _offset < {hi:UInt64}"
_NEW = "_ingested >= fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC')"
_OLD = "_ingested < fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC')"


@dataclass(frozen=True, slots=True)
class Range:
    """Offsets of one partition, hi excluded."""

    partition: Partition
    lo: int
    hi: int

    def parameters(self, since_ms: int | None) -> dict[str, object]:
        found: dict[str, object] = {
            "name": self.partition.name,
            "number": self.partition.number,
            "lo": self.lo,
            "hi": self.hi,
        }
        return found | ({"since_ms": since_ms} if since_ms is not None else {})


_RUNNING = "SELECT count() FROM system.processes WHERE Settings['log_comment'] = {comment:String}"


class ReplayStore(Store):
    """The materialiser's store, whose inserts are guarded by tokens: a replay owns no partition, and fences nobody."""

    async def insert_once(
        self, partition: Partition, records: Sequence[Record], token: str, present: Mapping[int, int]
    ) -> None:
        """One block, which each table takes once under this token. Raises Rejected or Unavailable."""
        await self.insert([Slice(partition, records, present)], self._by_token(partition, token))

    async def insert_refused(self, partition: Partition, record: Record, message: str, token: str) -> None:
        """A record no table takes, as a dead letter. Raises Unavailable."""
        await self.insert_dead(Slice(partition, [record]), message, self._by_token(partition, token))

    async def undecodable_once(self, partition: Partition, record: Undecodable, token: str) -> None:
        """A record that nobody can decode, as a dead letter. Raises Unavailable."""
        await self.insert_undecodable(Slice(partition, [record]), self._by_token(partition, token))

    def _by_token(self, partition: Partition, token: str) -> Guard:
        settings: dict[str, str | int] = {
            "insert_deduplication_token": token,
            "insert_deduplicate": 1,
            "deduplicate_blocks_in_dependent_materialized_views": 1,
        }
        return Guard(self._comment(partition), settings=settings)

    def _comment(self, partition: Partition) -> str:
        """Another than the materialiser's: neither waits for the other's inserts."""
        return f"fulgurite replay {self._settings.database} {partition}"

    async def present_in(self, where: Range, since_ms: int | None) -> dict[int, int]:
        """The offsets of the range that are there, and in which tables; `since_ms`: rows ingested since then."""
        found: dict[int, int] = {}
        condition = f"{_RANGE} AND {_NEW}" if since_ms is not None else _RANGE
        for table, bit in ((TABLES[where.partition.topic], OWN_TABLE), (DEAD_LETTERS, DEAD_LETTERS_TABLE)):
            query = f"SELECT DISTINCT _offset FROM {table} WHERE {condition}"
            for (offset,) in await self._query(query, where.parameters(since_ms)):
                found[offset] = found.get(offset, 0) | bit
        return found

    async def when_quiet(self, partition: Partition) -> None:
        """Returns when no insert of a replay runs: what one of a process that is gone brings is there then."""
        parameters: dict[str, object] = {"comment": self._comment(partition)}
        while (await self._query(_RUNNING, parameters))[0][0]:  # noqa: ASYNC110 (the server has nothing to wait on)
            await asyncio.sleep(QUIET_SECONDS)

    async def delete_old(self, where: Range, since_ms: int) -> None:
        """4: rows of the range from before `since_ms` whose offset has a row since. Raises Unavailable."""
        own = TABLES[where.partition.topic]
        new = " UNION ALL ".join(
            f"SELECT _offset FROM {table} WHERE {_RANGE} AND {_NEW}" for table in (own, DEAD_LETTERS)
        )
        for table in (own, DEAD_LETTERS):
            await self._command(
                f"DELETE FROM {table} WHERE {_RANGE} AND {_OLD} AND _offset IN ({new})", where.parameters(since_ms)
            )

    async def rows(self, where: Range) -> tuple[int, int]:
        """How many rows and dead letters the range has. Raises Unavailable."""
        counts: Sequence[int] = [
            (await self._query(f"SELECT count() FROM {table} WHERE {_RANGE}", where.parameters(None)))[0][0]
            for table in (TABLES[where.partition.topic], DEAD_LETTERS)
        ]
        return counts[0], counts[1]

    async def _command(self, statement: str, parameters: dict[str, object]) -> None:
        # Synchronous: when it returns the rows are gone for every query.
        settings = {"lightweight_deletes_sync": 2}
        try:
            await self._connected.command(statement, parameters=parameters, settings=settings)
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(str(error).splitlines()[0][:1_000]) from error

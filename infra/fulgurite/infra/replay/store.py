"""What a replay asks ClickHouse beyond what the materialiser does: ranges with an end, rows by their age, deletes.

Promises and errors as in the materialiser's store.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import aiohttp
from clickhouse_connect.driver.exceptions import ClickHouseError

from fulgurite.consumers.materialiser.agreement import differ, other_record
from fulgurite.consumers.materialiser.blocks import (
    BOTH_TABLES,
    DEAD_LETTERS_TABLE,
    OWN_TABLE,
    Partition,
    Slice,
    Unreadable,
)
from fulgurite.consumers.materialiser.contents import Body
from fulgurite.consumers.materialiser.errors import Unavailable
from fulgurite.consumers.materialiser.fences import Guard, fenced, renewed
from fulgurite.consumers.materialiser.store import OF_ALL, TABLES, Store
from fulgurite.infra.replay import marks
from fulgurite.infra.replay.marks import Mark
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import Topic

DEAD_LETTERS = "dead_letters"
QUIET_SECONDS = 0.1

_RANGE = "_topic = {name:String} AND _partition = {number:UInt32} AND _offset >= {lo:UInt64} AND _offset < {hi:UInt64}"
_NEW = "_ingested >= fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC')"
_UNTIL = " AND _ingested <= fromUnixTimestamp64Milli({until_ms:Int64}, 'UTC')"
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


class ReplayStore(Store):
    """The materialiser's store, whose inserts are guarded by claims: its fences, under a name of replays' own, so that
    neither refuses the other's inserts or waits for them."""

    def __init__(self, settings: ClickHouseSettings, insert_seconds: float, redaction: RedactionSettings) -> None:
        super().__init__(settings, insert_seconds, "replay", redaction)
        self._claims: dict[Partition, str] = {}

    async def claim(self, partitions: Sequence[Partition]) -> None:
        """0.4: no other replay inserts into these of one topic any more, once they are quiet. Raises Unavailable."""
        fence = await self.fence([_claimed(partition) for partition in partitions])
        self._claims.update(dict.fromkeys(partitions, fence))

    async def claim_anew(self, partition: Partition) -> None:
        """2: what is still on its way under our claim is refused. Nobody's who claimed since. Raises Unavailable."""
        fence = renewed(self._claims[partition])
        await self.write_fence([_claimed(partition)], fence)
        self._claims[partition] = fence

    async def insert_missing(self, part: Slice) -> None:
        """One block. Raises Unreadable, Rejected, Fenced or Unavailable."""
        await self.insert([part], self._by_claim(part.partition))

    async def insert_refused(self, part: Slice, message: str) -> None:
        """A record no table takes, as a dead letter. Raises Fenced or Unavailable."""
        await self.insert_dead(part, message, self._by_claim(part.partition))

    async def insert_left_out(self, part: Slice, error: Unreadable) -> None:
        """Records that the error names, as dead letters. Raises Fenced or Unavailable."""
        await self.insert_unreadable([part], error, self._by_claim(part.partition))

    async def insert_lost(self, part: Slice) -> None:
        """Records that nobody can decode, as dead letters. Raises Fenced or Unavailable."""
        await self.insert_undecodable(part, self._by_claim(part.partition))

    async def log_claimed(self, topic: Topic, found: Sequence[Mark], state: str) -> None:
        """0.5 and 4: into replay_log. when_quiet waits for it as for the inserts of records. Raises Fenced or
        Unavailable."""
        data = [json.dumps(marks.row(mark, state)).encode() + b"\n" for mark in found]
        body = Body(marks.COLUMNS, data, "JSONEachRow", {}, frozenset())
        # Of one partition several replays may be unfinished, if they began at once.
        partitions = dict.fromkeys(Partition(topic, mark.topic, mark.partition) for mark in found)
        await self._insert(marks.TABLE, body, self._by_claim(*partitions))

    def _by_claim(self, *partitions: Partition) -> Guard:
        return fenced(
            self._settings.database, [Slice(_claimed(part), [], fence=self._claims[part]) for part in partitions]
        )

    async def present_in(self, where: Range, since_ms: int | None, times: Mapping[int, int]) -> dict[int, int]:
        """The offsets of the range that are there, and in which tables; `since_ms`: rows ingested since then. `times`:
        of the records, in ms. Raises OtherLog where a row of whatever age is not theirs, and Unavailable."""
        found: dict[int, int] = {}
        others: list[int] = []
        counts = _NEW if since_ms is not None else "true"
        for table, bit, only in (
            (TABLES[where.partition.topic], OWN_TABLE, ""),
            (DEAD_LETTERS, DEAD_LETTERS_TABLE, ""),
            (DEAD_LETTERS, BOTH_TABLES, f" AND {OF_ALL}"),
        ):
            query = (
                f"SELECT _offset, toUnixTimestamp64Milli(_ts), max({counts}) FROM {table} WHERE {_RANGE}{only} "
                "GROUP BY ALL"
            )
            for offset, time_ms, new in await self._query(query, where.parameters(since_ms)):
                if offset in times and differ(time_ms, times[offset]):
                    others.append(offset)
                if new:
                    found[offset] = found.get(offset, 0) | bit
        if others:
            raise other_record(where.partition, min(others))
        return found

    async def when_quiet(self, *partitions: Partition) -> None:
        """Returns when no insert of a replay of these runs: what one of a process that is gone brings is there then.
        Raises Unavailable."""
        while await self.running([_claimed(partition) for partition in partitions]):  # noqa: ASYNC110 (the server has nothing to wait on)
            await asyncio.sleep(QUIET_SECONDS)

    async def delete_old(self, where: Range, since_ms: int) -> None:
        """4: rows of the range from before `since_ms` whose offset has a row since. Raises Unavailable."""
        await self._delete(_OLD, _NEW, where, where.parameters(since_ms))

    async def delete_new(self, where: Range, since_ms: int, until_ms: int) -> None:
        """0.5: rows of the range since `since_ms` whose offset has a row from before. None since `until_ms`: where we
        were frozen, another replay may have made them meanwhile, and delete the ones beside. Raises Unavailable."""
        await self._delete(_NEW + _UNTIL, _OLD, where, where.parameters(since_ms) | {"until_ms": until_ms})

    async def _delete(self, what: str, beside: str, where: Range, parameters: dict[str, object]) -> None:
        tables = (TABLES[where.partition.topic], DEAD_LETTERS)
        others = " UNION ALL ".join(f"SELECT _offset FROM {table} WHERE {_RANGE} AND {beside}" for table in tables)
        for table in tables:
            await self._command(f"DELETE FROM {table} WHERE {_RANGE} AND {what} AND _offset IN ({others})", parameters)

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


def _claimed(partition: Partition) -> Partition:
    """As it stands in ingest_fences: no topic's name has a space."""
    return replace(partition, name=f"replay of {partition.name}")

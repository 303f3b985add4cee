"""The materialiser's side of ClickHouse: insert a block, ask what is there, log what was inserted.

Promises: an insert that returns is in its tables; `Rejected` means the server looked at these records and will never
take all of them; any other error is `Unavailable`: the insert may or may not have happened, and trying again makes
sense. Knows nothing of batches, groups or offsets' order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError, Error

from fulgurite.consumers.materialiser.blocks import (
    DEAD_LETTERS_TABLE,
    OWN_TABLE,
    Partition,
    Record,
    TooManyLines,
    arrow,
    block,
    dead_block,
    missing,
)
from fulgurite.consumers.otlp import batches
from fulgurite.consumers.otlp.wire import Malformed
from fulgurite.schemas import topics
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import Topic

TABLES: dict[Topic, str] = {
    topics.ROLLOUTS: "rollout_events",
    topics.SPANS: "spans",
    topics.OTLP_SPANS: "spans",
    topics.REWARDS: "rewards",
    topics.TRAJECTORIES: "trajectories",
    topics.RESOURCES: "resources",
    topics.TRAINING: "training_events",
    topics.WORKERS: "worker_heartbeats",
    topics.DEAD_LETTERS: "dead_letters",
}
"""Where a topic's records end, when they are not refused: the one table, beside dead_letters, to look for an offset
in."""

# Errors about the data itself. Everything else (memory, disk, too many parts, a missing table, network) is retried:
# taking a broken server for broken records would turn a whole topic into dead letters.
_REJECTED_CODES = frozenset(
    {
        6,  # CANNOT_PARSE_TEXT
        26,  # CANNOT_PARSE_QUOTED_STRING
        27,  # CANNOT_PARSE_INPUT_ASSERTION_FAILED
        38,  # CANNOT_PARSE_DATE
        41,  # CANNOT_PARSE_DATETIME
        53,  # TYPE_MISMATCH
        69,  # ARGUMENT_OUT_OF_BOUND
        70,  # CANNOT_CONVERT_TYPE
        72,  # CANNOT_PARSE_NUMBER
        117,  # INCORRECT_DATA
        128,  # TOO_LARGE_ARRAY_SIZE
        131,  # TOO_LARGE_STRING_SIZE
        190,  # SIZES_OF_ARRAYS_DONT_MATCH
        321,  # VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE
        349,  # CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN
        395,  # FUNCTION_THROW_IF_VALUE_IS_NON_ZERO
        407,  # DECIMAL_OVERFLOW
        469,  # VIOLATED_CONSTRAINT
    }
)


_ONE_BLOCK = 2**40
_CHUNK_BYTES = 256 * 1024
"""Of an insert's body, between which the event loop gets its turn."""


@dataclass(frozen=True, slots=True)
class Body:
    """What one insert carries."""

    columns: Sequence[str]
    data: bytes | memoryview
    format: str
    settings: Mapping[str, str | int]
    refusals: frozenset[int]
    """ClickHouse's error codes that say: not these data."""


class Unavailable(Exception):
    """ClickHouse could not be asked, or did not say how it went."""


class Rejected(Exception):
    """ClickHouse will not take these records, however often it is asked."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A finished range."""

    partition: Partition
    lo: int
    hi: int
    records: int


class Store:
    """One connection pool. `connect` first, `close` at the end."""

    def __init__(self, settings: ClickHouseSettings, insert_seconds: float, consumer: str) -> None:
        self._settings = settings
        self._insert_seconds = insert_seconds
        self._consumer = consumer
        self._client: AsyncClient | None = None

    async def connect(self) -> None:
        """Raises Unavailable."""
        try:
            self._client = await clickhouse_connect.get_async_client(
                **connection_options(self._settings),
                database=self._settings.database,
                connect_timeout=5,
                # The server ends the insert by itself after insert_seconds; the client then still gets its answer.
                send_receive_timeout=self._insert_seconds + 5,
                compress=False,
            )
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(_first_line(error)) from error

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def insert(
        self, partition: Partition, records: Sequence[Record], token: str, present: Mapping[int, int] | None = None
    ) -> None:
        """One block into in_<topic>, for the tables that lack it; `records` are those that one lacks (`missing`).
        Raises Rejected or Unavailable."""
        into, present = f"in_{partition.topic.name}", present or {}
        try:
            await self._insert(into, await asyncio.to_thread(_body, partition, records, present), partition, token)
        except Rejected:
            if partition.topic is not topics.OTLP_SPANS:
                raise
            # Nothing of it is in the tables, nor its token: the same rows, written so that the server reads them.
            body = await asyncio.to_thread(_body, partition, records, present, mend=True)
            await self._insert(into, body, partition, token)

    async def insert_dead(self, partition: Partition, record: Record, message: str) -> None:
        """A record no table takes, straight into dead_letters. Raises Unavailable."""
        token = f"{partition.token(record.offset, record.offset)}-dead"
        await self._insert("dead_letters", arrow_body(dead_block(partition, record, message)), partition, token)

    async def _insert(self, into: str, body: Body, partition: Partition, token: str) -> None:
        settings: dict[str, Any] = {
            "insert_deduplication_token": token,
            "insert_deduplicate": 1,
            "deduplicate_blocks_in_dependent_materialized_views": 1,
            "async_insert": 0,
            "max_execution_time": self._insert_seconds,
            "max_threads": 1,
            # One block in, one block to each table, whatever its size.
            "max_insert_block_size": _ONE_BLOCK,
            "min_insert_block_size_rows": _ONE_BLOCK,
            "min_insert_block_size_bytes": _ONE_BLOCK,
            # A batch read from the beginning of a topic may span more months than the server likes in one insert.
            "max_partitions_per_insert_block": 0,
            # The views are analysed anew by every insert, in tens of ms of CPU: what helps long queries is left
            # out. Their functions are all cheap and none raises, so nothing is gained by evaluating them for some rows.
            "query_plan_enable_optimizations": 0,
            "compile_expressions": 0,
            "short_circuit_function_evaluation": "disable",
            # By this name a successor finds what of us still runs.
            "log_comment": self._tag(partition),
            **body.settings,
        }
        try:
            await self._connected.raw_insert(
                into, body.columns, _chunks(body.data), settings=settings, fmt=body.format, compression=None
            )
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, Error) and error.code in body.refusals:
                raise Rejected(_first_line(error)) from error
            raise Unavailable(_first_line(error)) from error

    async def log(self, entries: Sequence[LogEntry]) -> None:
        """Says that these ranges are in. Raises Unavailable."""
        columns = ["_topic", "_partition", "lo", "hi", "records", "consumer"]
        rows = [[e.partition.name, e.partition.number, e.lo, e.hi, e.records, self._consumer] for e in entries]
        try:
            await self._connected.insert("ingest_log", rows, column_names=columns, settings={"async_insert": 0})
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(_first_line(error)) from error

    async def logged(self, partition: Partition) -> int:
        """One more than the highest offset the log knows of, 0 where it knows none. Raises Unavailable."""
        rows = await self._query(
            "SELECT max(hi) + 1 FROM ingest_log WHERE _topic = {name:String} AND _partition = {number:UInt32} "
            "HAVING count() > 0",
            {"name": partition.name, "number": partition.number},
        )
        return rows[0] if rows else 0

    async def present(self, partition: Partition, lo: int) -> dict[int, int]:
        """The offsets from lo on that are in the tables, and in which (OWN_TABLE, DEAD_LETTERS_TABLE, their sum).
        Raises Unavailable."""
        where = "_topic = {name:String} AND _partition = {number:UInt32} AND _offset >= {lo:UInt64}"
        found: dict[int, int] = {}
        for table, bit in ((TABLES[partition.topic], OWN_TABLE), ("dead_letters", DEAD_LETTERS_TABLE)):
            query = f"SELECT DISTINCT _offset FROM {table} WHERE {where}"
            parameters: dict[str, object] = {"name": partition.name, "number": partition.number, "lo": lo}
            for offset in await self._query(query, parameters):
                found[offset] = found.get(offset, 0) | bit
        return found

    async def missing(self, partition: Partition, lo: int, hi: int) -> int:
        """How many offsets of lo..hi are in no table. Raises Unavailable."""
        where = (
            "_topic = {name:String} AND _partition = {number:UInt32} AND _offset BETWEEN {lo:UInt64} AND {hi:UInt64}"
        )
        parts = (f"SELECT _offset FROM {table} WHERE {where}" for table in (TABLES[partition.topic], "dead_letters"))
        query = f"SELECT uniqExact(_offset) FROM ({' UNION ALL '.join(parts)})"
        found = await self._query(query, {"name": partition.name, "number": partition.number, "lo": lo, "hi": hi})
        return hi - lo + 1 - found[0]

    async def dead_letters(self) -> dict[tuple[str, str], int]:
        """(reason, stage) -> rows. Raises Unavailable."""
        try:
            result = await self._connected.query("SELECT reason, stage, count() FROM dead_letters GROUP BY ALL")
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(_first_line(error)) from error
        return {(str(reason), str(stage)): int(rows) for reason, stage, rows in result.result_rows}

    async def inserting(self, partition: Partition) -> bool:
        """Whether the server is at an insert for this partition, ours or a predecessor's. Raises Unavailable."""
        query = "SELECT count() FROM system.processes WHERE Settings['log_comment'] = {tag:String}"
        return (await self._query(query, {"tag": self._tag(partition)}))[0] > 0

    def _tag(self, partition: Partition) -> str:
        return f"fulgurite materialiser {self._settings.database} {partition}"

    async def _query(self, query: str, parameters: dict[str, object]) -> list[int]:
        try:
            result = await self._connected.query(query, parameters=parameters)
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(_first_line(error)) from error
        return [int(row[0]) for row in result.result_rows]

    @property
    def _connected(self) -> AsyncClient:
        assert self._client is not None, "connect() comes first"
        return self._client


def _body(partition: Partition, records: Sequence[Record], present: Mapping[int, int], *, mend: bool = False) -> Body:
    """Raises Rejected where there is nothing to send to the server, because it is not what it should be."""
    if partition.topic is not topics.OTLP_SPANS:
        try:
            return arrow_body(block(partition, records, present))
        except TooManyLines as error:
            raise Rejected(str(error)) from error
    try:
        data = batches.body(
            partition.name,
            partition.number,
            records,
            lambda at: missing(partition.topic, present.get(at, 0)),
            mend=mend,
        )
    except Malformed as error:
        raise Rejected(str(error)) from error
    return Body(batches.COLUMNS, data, batches.FORMAT, batches.insert_settings(), _REJECTED_CODES | batches.REFUSALS)


def arrow_body(table: pa.Table) -> Body:
    """For a table or an input table that takes Arrow."""
    return Body(table.column_names, arrow(table), "ArrowStream", {}, _REJECTED_CODES)


async def _chunks(data: bytes | memoryview) -> AsyncIterator[bytes]:
    """Of a body given in one piece the client makes three copies; one in pieces it also never sends again by itself."""
    view = memoryview(data)
    for at in range(0, len(view), _CHUNK_BYTES):
        yield bytes(view[at : at + _CHUNK_BYTES])


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:1_000]

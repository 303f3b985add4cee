"""The materialiser's side of ClickHouse: insert a block, ask what is there, log what was inserted.

Promises: an insert that returns is in its tables; `Rejected` means the server looked at these records and will never
take all of them; any other error is `Unavailable`: the insert may or may not have happened, and trying again makes
sense. Knows nothing of batches, groups or offsets' order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import aiohttp
import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError, Error

from fulgurite.schemas import topics
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import ClickHouseSettings
from fulgurite.schemas.topics import Topic

TABLES: dict[Topic, str] = {
    topics.ROLLOUTS: "rollout_events",
    topics.SPANS: "spans",
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


class Unavailable(Exception):
    """ClickHouse could not be asked, or did not say how it went."""


class Rejected(Exception):
    """ClickHouse will not take these records, however often it is asked."""


class Record(Protocol):
    """What is needed of aiokafka's ConsumerRecord."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of one topic, by the topic's full name."""

    topic: Topic
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}-{self.number}"

    def token(self, lo: int, hi: int) -> str:
        """Names the range lo..hi; the deduplication token of its insert."""
        return f"{self}-{lo}-{hi}"


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

    async def insert(self, partition: Partition, records: Sequence[Record], token: str) -> None:
        """One block into in_<topic>. Raises Rejected or Unavailable."""
        block = await asyncio.to_thread(_block, partition, records)
        await self._insert(f"in_{partition.topic.name}", block, partition, token)

    async def insert_dead(self, partition: Partition, record: Record, message: str) -> None:
        """A record no table takes, straight into dead_letters. Raises Unavailable."""
        token = f"{partition.token(record.offset, record.offset)}-dead"
        await self._insert("dead_letters", _dead_block(partition, record, message), partition, token)

    async def _insert(self, table: str, block: pa.Table, partition: Partition, token: str) -> None:
        settings = {
            "insert_deduplication_token": token,
            "insert_deduplicate": 1,
            "deduplicate_blocks_in_dependent_materialized_views": 1,
            "async_insert": 0,
            "max_execution_time": self._insert_seconds,
            "max_threads": 1,
            # A batch read from the beginning of a topic may span more months than the server likes in one insert.
            "max_partitions_per_insert_block": 0,
            # By this name a successor finds what of us still runs.
            "log_comment": self._tag(partition),
        }
        try:
            await self._connected.raw_insert(
                table, block.column_names, _arrow(block), settings=settings, fmt="Arrow", compression=None
            )
        except (ClickHouseError, aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, Error) and error.code in _REJECTED_CODES:
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

    async def present(self, partition: Partition, lo: int) -> set[int]:
        """The offsets from lo on that are in the tables. Raises Unavailable."""
        tables = {TABLES[partition.topic], "dead_letters"}
        where = "_topic = {name:String} AND _partition = {number:UInt32} AND _offset >= {lo:UInt64}"
        query = " UNION ALL ".join(f"SELECT _offset FROM {table} WHERE {where}" for table in sorted(tables))
        return set(await self._query(query, {"name": partition.name, "number": partition.number, "lo": lo}))

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


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:1_000]


def _block(partition: Partition, records: Sequence[Record]) -> pa.Table:
    """One chunk a column, so that the server sees one block: the unit that a table takes wholly or not at all."""
    count = len(records)
    headers = pa.array(
        [[(name, value or b"") for name, value in record.headers] for record in records],
        pa.map_(pa.string(), pa.binary()),
    )
    return pa.table(
        {
            "raw": pa.array([record.value or b"" for record in records], pa.binary()),
            "key": pa.array([record.key or b"" for record in records], pa.binary()),
            "headers": headers,
            "_topic": pa.array([partition.name], pa.string()).take(pa.array([0] * count, pa.int32())),
            "_partition": pa.array([partition.number] * count, pa.uint32()),
            "_offset": pa.array([record.offset for record in records], pa.uint64()),
            "_ts": pa.array([record.timestamp for record in records], pa.timestamp("ms", "UTC")),
        }
    )


def _dead_block(partition: Partition, record: Record, message: str) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "topic": partition.name,
                "partition": partition.number,
                "offset": record.offset,
                "stage": "materialiser",
                "reason": "rejected",
                "message": message,
                "key": record.key or b"",
                "value": record.value or b"",
                "_topic": partition.name,
                "_partition": partition.number,
                "_offset": record.offset,
                "_ts": datetime.fromtimestamp(max(record.timestamp, 0) / 1000, UTC),
            }
        ]
    )


def _arrow(block: pa.Table) -> bytes:
    """Arrow's file format: it ends with a footer, so a body cut short is refused."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, block.schema) as writer:
        writer.write_table(block)
    return sink.getvalue().to_pybytes()

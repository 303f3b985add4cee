"""Reads one place of a partition record by record, where aiokafka's consumer raises on one of them and gives none.

Promises: of the batches from an offset on each record that such a reader sees, once, in order. One that cannot be
decoded (a header's name that is not UTF-8, lengths that do not fit) is `Undecodable`, with its original bytes: the
value where it can be told, else all of the record. Raises when the first batch cannot be read at all: a checksum that
is wrong, a codec that is not there, an answer that is an error. What is committed, aiokafka's own code decides.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import ConsumerRecord, TopicPartition, codec
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED, PartitionRecords
from aiokafka.errors import CorruptRecordException, LeaderNotAvailableError, UnsupportedCodecError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatch

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings

READ_BYTES: Final = 1024 * 1024
"""Of one answer, unless its first batch alone is larger: each record costs some µs of Python."""
READ_SECONDS: Final = 15.0
"""Longest that connecting and asking may take."""

_HEADER: Final = struct.Struct(">qiibIhiqqqhii")
"""Of a batch: base offset, length, leader epoch, magic, CRC, attributes, last offset delta, first and greatest time,
producer's id, epoch and sequence, number of records."""
_LENGTH_AT, _LENGTH_ENDS = 8, 12
_CODEC, _LOG_APPEND_TIME = 0x07, 0x08
_DECODERS: Final = {1: codec.gzip_decode, 2: codec.snappy_decode, 3: codec.lz4_decode, 4: codec.zstd_decode}


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A record that is none, for what is wrong with its bytes."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    """All of the record, where its value cannot be told."""
    why: str
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """What lies from an offset on."""

    records: list[ConsumerRecord[bytes, bytes] | Undecodable]
    next: int
    """Where to go on."""


async def read(settings: KafkaSettings, tp: TopicPartition, offset: int, *, committed: bool = True) -> Read:
    """By a connection of its own; `committed`: only what is. Raises what aiokafka and its codecs raise."""
    async with asyncio.timeout(READ_SECONDS):
        client = AIOKafkaClient(**connection_options(settings), client_id="fulgurite-raw")
        try:
            await client.bootstrap()
            await client.set_topics([tp.topic])
            leader = client.cluster.leader_for_partition(tp)
            if leader is None or leader < 0:
                raise LeaderNotAvailableError(tp)
            return await fetched(client, leader, tp, offset, READ_BYTES, committed=committed)
        finally:
            await client.close()


async def fetched(
    client: AIOKafkaClient,
    leader: int,
    tp: TopicPartition,
    offset: int,
    most_bytes: int,
    wait_ms: int = 500,
    *,
    committed: bool = True,
) -> Read:
    """From this broker. Raises what aiokafka and its codecs raise."""
    wanted = [(tp.topic, [(tp.partition, offset, most_bytes)])]
    isolation = READ_COMMITTED if committed else READ_UNCOMMITTED
    answer: Any = await client.send(leader, FetchRequest(wait_ms, 1, most_bytes, isolation, wanted))
    ((_, ((_, code, _, *more),)),) = answer.topics
    if code:
        raise for_code(code)(tp)
    aborted = more[2] if answer.API_VERSION >= 11 else more[-2]
    return unpacked(tp, offset, more[-1] or b"", aborted, isolation)


def unpacked(
    tp: TopicPartition,
    offset: int,
    data: bytes,
    aborted: list[tuple[int, int]] | None,
    isolation: int = READ_COMMITTED,
) -> Read:
    """Of an answer's bytes, up to the first batch that cannot be read; raises when that is the first of all."""
    batches = _Batches(data)
    visible = PartitionRecords(tp, batches, aborted, offset, None, None, True, isolation)
    found: list[ConsumerRecord[bytes, bytes] | Undecodable] = []
    try:
        for record in visible:
            why = batches.odd.get(record.offset)
            if why is None:
                found.append(record)
            else:
                place = (tp.topic, tp.partition, record.offset)
                found.append(Undecodable(*place, record.timestamp, record.key, record.value, why))
    except Exception:  # codecs raise errors of many kinds
        if visible.next_fetch_offset == offset:
            raise
    return Read(found, visible.next_fetch_offset)


class _Batches:
    """For aiokafka's PartitionRecords: the whole batches of an answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.odd: dict[int, str] = {}
        """By offset, what is wrong with records that were given."""

    def _end(self) -> int:
        (length,) = struct.unpack_from(">i", self._data, self._at + _LENGTH_AT)
        if length < _HEADER.size - _LENGTH_ENDS:
            raise CorruptRecordException(f"a batch of {length} bytes")
        return self._at + _LENGTH_ENDS + int(length)

    def has_next(self) -> bool:
        # The last batch of an answer may be cut off.
        return len(self._data) - self._at >= _HEADER.size and self._end() <= len(self._data)

    def next_batch(self) -> _Batch:
        begin, self._at = self._at, self._end()
        return _Batch(self._data[begin : self._at], self.odd)


class _Batch:
    """aiokafka's, but for the decoding of records."""

    def __init__(self, data: bytes, odd: dict[int, str]) -> None:
        self._data = data
        self._odd = odd
        self._batch = DefaultRecordBatch(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        """Of a batch that is a marker, whose record is the cluster's own."""
        return next(iter(self._batch))

    def __iter__(self) -> Iterator[_Record]:
        base, _, _, _, _, attributes, _, first_ms, greatest_ms, _, _, _, count = _HEADER.unpack_from(self._data)
        body = _decompressed(attributes & _CODEC, self._data[_HEADER.size :])
        at = 0
        for _ in range(count):
            length, at = _varint(body, at)
            if not 0 < length <= len(body) - at:
                raise CorruptRecordException(f"a record of {length} bytes")
            data, at = body[at : at + length], at + length
            after, place = _varint(data, 1)
            delta, place = _varint(data, place)
            record = _Record(base + delta, greatest_ms if attributes & _LOG_APPEND_TIME else first_ms + after)
            try:
                record.decode(data, place)
            except (ValueError, IndexError) as error:
                self._odd[record.offset] = str(error)
            yield record


@dataclass(slots=True)
class _Record:
    """What PartitionRecords asks of a record."""

    offset: int
    timestamp: int
    timestamp_type: int = 0
    checksum: None = None
    key: bytes | None = None
    value: bytes | None = None
    headers: list[tuple[str, bytes | None]] = field(default_factory=list[tuple[str, bytes | None]])

    def decode(self, data: bytes, at: int) -> None:
        """Raises ValueError or IndexError; key and value are then those that can be told."""
        self.value = data
        key, at = _text(data, at)
        value, at = _text(data, at)
        self.key, self.value = key, value
        count, at = _varint(data, at)
        for _ in range(count):
            name, at = _text(data, at)
            content, at = _text(data, at)
            try:
                self.headers.append(((name or b"").decode(), content))
            except UnicodeDecodeError as error:
                raise ValueError(f"a header's name is not UTF-8: {name!r:.200}") from error
        if count < 0 or at != len(data):
            raise ValueError("its headers do not end where the record does")


def _text(data: bytes, at: int) -> tuple[bytes | None, int]:
    """Bytes behind their length."""
    length, at = _varint(data, at)
    if length < 0:
        return None, at
    if length > len(data) - at:
        raise ValueError(f"{length} bytes are said to be where {len(data) - at} are")
    return data[at : at + length], at + length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """aiokafka's own reads on behind the end of the data."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _decompressed(kind: int, data: bytes) -> bytes:
    if not kind:
        return data
    if kind not in _DECODERS:
        raise UnsupportedCodecError(f"codec {kind} is unknown")
    return bytes(_DECODERS[kind](data))

"""Fetches the assigned partitions' records into their buffers, and loses none, whatever a fetch raises.

    together   all partitions by one call, as long as none fails
    apart      for a while after an error: each by a call of its own, so that it is known which one fails
    rescue     of a partition that failed: it is held, and read raw (raw.py) until it goes on behind what was wrong

Promises: what aiokafka had drained when a call raised is gone, and the positions are behind it; so, before anything
else is appended, each partition that the call asked for is sought back to what its buffer wants next. (A gap in offsets
says nothing: markers of transactions, aborted and compacted records are missing in every log.) A record that cannot be
decoded reaches its buffer as `Undecodable`. A partition that cannot be read is tried again every RETRY_SECONDS, is not
ready meanwhile, and keeps no other waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
)

from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.partition import PartitionBuffer
from fulgurite.producers.raw import Read

logger = logging.getLogger(__name__)

POLL_MS: Final = 50
"""How long a fetch waits when nothing came; the loop then sleeps as long. Batches are made by the writers."""
APART_SECONDS: Final = 10.0
"""After an error: what was sought back is there again, and fails again, well within it."""
RETRY_SECONDS: Final = 5.0

_OF_A_PARTITION: Final = (
    CorruptRecordException,
    UnsupportedCodecError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
)
"""Other errors of Kafka's are the group's or the connection's. Decoders raise what is none of Kafka's."""


class Fetched(Protocol):
    """What is needed of aiokafka's consumer."""

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> Mapping[TopicPartition, Sequence[ConsumerRecord[Any, Any]]]: ...


class Fetching:
    """Run it with `run`, cancel that to stop."""

    def __init__(
        self,
        buffers: Mapping[TopicPartition, PartitionBuffer],
        wake: Callable[[str], None],
        read: Callable[[TopicPartition, int], Awaitable[Read]],
        doubt: Callable[[TopicPartition, str], None],
        batch_records: int,
        metrics: Metrics,
    ) -> None:
        """`buffers` are those of the moment; `wake` is told a topic whose buffers got records; `read` is raw.read;
        `doubt` is told of a partition whose log lacks what is wanted next."""
        self._buffers = buffers
        self._wake = wake
        self._read = read
        self._doubt = doubt
        self._batch_records = batch_records
        self._metrics = metrics
        self._apart_until = 0.0
        self._rescues: dict[PartitionBuffer, asyncio.Task[None]] = {}

    async def run(self, consumer: Fetched) -> None:
        """Until cancelled."""
        try:
            while True:
                came = await (self._apart(consumer) if self._is_apart() else self._fetch(consumer))
                await asyncio.sleep(0 if came else POLL_MS / 1000)
        finally:
            for task in self._rescues.values():
                task.cancel()
            await asyncio.gather(*self._rescues.values(), return_exceptions=True)

    def _is_apart(self) -> bool:
        return time.monotonic() < self._apart_until

    async def _apart(self, consumer: Fetched) -> bool:
        came = False
        for tp in [tp for tp, buffer in self._buffers.items() if buffer not in self._rescues]:
            if self._is_apart():
                came = await self._fetch(consumer, tp) or came
        return came

    async def _fetch(self, consumer: Fetched, *asked: TopicPartition) -> bool:
        """Of these partitions, or of all. Whether something came."""
        timeout_ms = 0 if asked else POLL_MS
        try:
            found = await consumer.getmany(*asked, timeout_ms=timeout_ms, max_records=self._batch_records)
        except ConsumerStoppedError:
            raise
        except OffsetOutOfRangeError as error:  # raised where nothing was drained
            for tp, offset in error.args[0].items():
                self._doubt(tp, f"its log has no offset {offset}")
            return False
        except Exception as error:  # decoders raise errors of many kinds, and each loses what was drained
            self._seek_back(asked or list(self._buffers))
            await self._failed(asked, error)
            return False
        self._metrics.fetched()
        for tp, records in found.items():
            if (buffer := self._buffers.get(tp)) is not None:
                buffer.append(records)
                self._wake(tp.topic)
        return bool(found)

    def _seek_back(self, asked: Sequence[TopicPartition]) -> None:
        for tp in asked:
            # Not assigned any more: whoever is will begin where the tables end.
            with contextlib.suppress(IllegalStateError):
                if (buffer := self._buffers.get(tp)) is not None:
                    buffer.rewind()

    async def _failed(self, asked: Sequence[TopicPartition], error: Exception) -> None:
        if isinstance(error, KafkaError) and not isinstance(error, _OF_A_PARTITION):
            logger.warning("cannot fetch, trying again: %r", error)
            self._metrics.not_fetched(f"cannot fetch: {error!r:.500}")
            self._apart_until = 0.0
            await asyncio.sleep(RETRY_SECONDS)
            return
        self._apart_until = time.monotonic() + APART_SECONDS
        if not asked:
            logger.warning("a fetch failed, and is made again partition by partition: %r", error)
        for tp in asked:
            if (buffer := self._buffers.get(tp)) is not None and buffer not in self._rescues:
                where = {"topic": tp.topic, "partition": tp.partition, "offset": buffer.next}
                logger.warning("%s: %r: read raw from offset %d on", buffer.partition, error, buffer.next, extra=where)
                buffer.hold()
                task = asyncio.create_task(self._rescue(buffer))
                self._rescues[buffer] = task
                task.add_done_callback(lambda _, buffer=buffer: self._rescues.pop(buffer, None))

    async def _rescue(self, buffer: PartitionBuffer) -> None:
        """Until the partition goes on, or is not ours."""
        topic, number = buffer.partition.name, buffer.partition.number
        while not buffer.closed:
            at = buffer.next
            try:
                found = await self._read(buffer.tp, at)
            except Exception as error:  # as above; and the network's
                where = {"topic": topic, "partition": number, "offset": buffer.next}
                what = "%s: offset %d cannot be read, trying again: %r"
                logger.error(what, buffer.partition, buffer.next, error, extra=where)
                if not buffer.closed:
                    self._metrics.unreadable(topic, number, f"offset {buffer.next} cannot be read: {error!r:.500}")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if not buffer.closed and (buffer.next != at or not buffer.reading):
                await asyncio.sleep(POLL_MS / 1000)  # it was settled anew meanwhile, and wants others
                continue
            if not buffer.closed:  # a buffer of its successor must not get them
                self._apart_until = time.monotonic() + APART_SECONDS
                buffer.append(found.records)
                self._metrics.readable(topic, number)
                with contextlib.suppress(IllegalStateError):
                    buffer.release(found.next)
                self._wake(topic)
            return

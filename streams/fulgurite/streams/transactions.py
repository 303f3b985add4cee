"""A Kafka transaction that has happened exactly once when `commit` returns, whatever the broker did meanwhile.

    transactions = Transactions(settings.kafka, transactional_id="…", group="…")
    await transactions.start()                              # 1. fences a predecessor and ends what it left open
    before = await transactions.committed(partitions)       # 2. offsets as the last committed transaction left them
    before = await transactions.claim(partitions)           #    … and no predecessor that wakes up commits any more
    await transactions.commit(records, offsets)             # 3. records and offsets become visible together, or Fenced
    await transactions.confirm()                            #    … nothing does, but Fenced where another one has begun
    await transactions.close()

Promises
- `commit` returns only after its one transaction is committed. A broker that is away, restarts or lets the transaction
  time out is waited for, for ever, with a warning every few seconds; the same content is tried again until it is in.
- It never writes twice. Where the broker's answer is lost (was it committed?), the offsets are the witness: each commit
  stamps an id on the offsets it commits, in the same transaction; after a new start they are read back. Our id: it was
  committed. The previous one: it was not, try again. A stranger's: another process took over.
- Another process with the same transactional id makes `commit` raise Fenced, and this one must end (exit 5): the other
  one owns the work. A transaction that only timed out on the broker (same error) is told apart by its age.
- What can never succeed (no permission, a record over the topic's bound) is raised as aiokafka's own error.

aiokafka 0.14 passes no group generation with the offsets, so nothing but the transactional id fences: it must name the
input partitions its owner consumes. Its producer does not survive errors inside a transaction (sequence numbers and the
transaction's state are then wrong for good), so after any error a new one is made: InitProducerId ends the old
transaction on the broker before it answers, which is also why `committed` after `start` reads what is final.

Does not know what the records mean. One `commit` at a time; not thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalOperation,
    InvalidProducerEpoch,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.producers.kafka import connection_options, take_failure
from fulgurite.schemas.dead_letters import Headers
from fulgurite.schemas.errors import Fenced
from fulgurite.schemas.ids import new_id
from fulgurite.schemas.settings import KafkaSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSACTION_TIMEOUT_MS = 15_000
"""The broker aborts what a dead process left open after this; until then read_committed readers wait behind it."""

BATCH_BYTES = 1 << 20
"""Trajectories are tens of kilobytes: aiokafka's default of 16 KiB would make a batch of each."""

COMPRESSION = "zstd"
"""As producer.compression is where it is not set."""

RECORD_OVERHEAD_BYTES = 64 * 1024
"""Keys, headers and framing that aiokafka counts in on top of a value of kafka.max_record_bytes."""

_BACKOFF_SECONDS = 0.25
_WARN_SECONDS = 5.0
_CLOSE_SECONDS = 1.0
_LOOK_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.02

_HOPELESS = (
    GroupAuthorizationFailedError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)

Hook = Callable[[str], None]
"""Called with the name of each step of a commit as it is reached; crash tests end the process in it."""


def no_hook(step: str) -> None:
    """Does nothing: the hook outside tests."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be sent in a transaction."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers | None = None
    partition: int | None = None
    """None: Kafka's murmur2 over the key chooses."""


class Transactions:
    """One transactional id, one consumer group, one transaction at a time."""

    def __init__(
        self,
        settings: KafkaSettings,
        transactional_id: str,
        group: str,
        *,
        timeout_ms: int = TRANSACTION_TIMEOUT_MS,
        hook: Hook = no_hook,
    ) -> None:
        self._settings = settings
        self._transactional_id = transactional_id
        self._group = group
        self._timeout_ms = timeout_ms
        self._hook = hook
        self._producer: AIOKafkaProducer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._stamps: dict[TopicPartition, str] = {}
        """The commit id last seen on each partition's offset: what a commit of nobody else leaves there."""
        self._earlier: dict[TopicPartition, str] = {}
        """The one before it: an instant after a commit it can still be read."""
        self._last: dict[TopicPartition, OffsetAndMetadata] = {}
        """What this process last committed, without the stamps."""
        self._lineage = ""

    @property
    def lineage(self) -> str:
        """Of these offsets on this broker: the same for everyone who ever commits them, another one elsewhere, be it
        under the same name. Known after `committed` or `claim`, for good after the first commit."""
        return self._lineage

    async def start(self) -> None:
        """Waits for the broker, for as long as it takes; then predecessors are fenced and their transactions ended."""
        await patiently(f"start of {self._transactional_id}", self._start)

    async def committed(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """The group's offsets, None where it has none. Later commits rely on nobody else moving them.

        To be asked after start() and before a commit: offsets of a commit are readable only when the broker has written
        its markers, an instant after the commit was acknowledged, and InitProducerId waits for just that.
        """
        found = await self._read(partitions)
        self._stamps.update({tp: _stamp(at) for tp, at in found.items()})
        inherited = (stamp.partition(".")[0] for stamp in self._stamps.values() if stamp)
        self._lineage = self._lineage or next(inherited, "") or new_id()
        return {tp: None if at is None else OffsetAndMetadata(at.offset, _plain(at)) for tp, at in found.items()}

    async def claim(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata | None]:
        """As `committed`, then stamps the offsets, as they are, as this process's (0 where there were none).

        For an owner that undoes what a predecessor left outside of Kafka, or takes long to its first commit. Such a
        predecessor that was cut off in the middle of a commit, and comes back, would find the offsets as it left them,
        fence its heir and commit; now it finds a stranger's stamp, whenever it looks: the stamps can be read when this
        returns. Raises Fenced as `commit` does.
        """
        before = await self.committed(partitions)
        theirs = dict(self._stamps)
        await self.commit([], {tp: OffsetAndMetadata(0, "") if at is None else at for tp, at in before.items()})
        # Acknowledged before the broker has written the markers. Whoever looks until then would fence us.
        while any(  # noqa: ASYNC110 (the broker tells nobody)
            _stamp(at) == theirs[tp] for tp, at in (await self._read(before)).items()
        ):
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return before

    async def commit(self, records: Sequence[Outgoing], offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        """Writes records and offsets in one transaction. Raises Fenced when another process owns the work now.

        `offsets` must not be empty, and every partition in it must have been asked for with `committed` before.
        """
        assert offsets, "without offsets nothing would tell whether a lost answer meant committed"
        assert all(tp in self._stamps for tp in offsets), "committed() must have been asked about every partition"
        stamp = f"{self._lineage}.{new_id()}"
        stamped = {tp: OffsetAndMetadata(at.offset, f"{stamp} {at.metadata}") for tp, at in offsets.items()}
        while True:
            attempt = asyncio.ensure_future(self._attempt(records, stamped))
            error = await visibly(f"transaction of {self._transactional_id}", attempt)
            if error is None:
                break
            logger.warning("%s: transaction failed, asking the broker how it ended: %r", self._transactional_id, error)
            await self._look_for_heir(stamped, stamp)
            await self.start()
            if await self._is_committed(stamped, stamp):
                break
        self._earlier.update({tp: self._stamps[tp] for tp in stamped})
        self._stamps.update(dict.fromkeys(stamped, stamp))
        self._last.update(offsets)

    async def confirm(self) -> None:
        """A commit of nothing: the offsets stay where this process's last commit or claim left them.

        Raises Fenced as `commit` does. Where it does not, nothing that another process has written outside of Kafka up
        to now will ever be committed by it: it is a predecessor, and fenced.
        """
        await self.commit([], dict(self._last))

    async def close(self) -> None:
        """Closes within seconds, the broker there or not. An open transaction is left to the broker to abort."""
        producer, self._producer = self._producer, None
        admin, self._admin = self._admin, None
        if producer is not None:
            take_failure(producer)
            await _bounded(producer.stop())
            await _bounded(producer.client.close())
        if admin is not None:
            await _bounded(admin.close())

    async def _attempt(
        self, records: Sequence[Outgoing], offsets: Mapping[TopicPartition, OffsetAndMetadata]
    ) -> KafkaError | None:
        """One try. Gives the error after which it is not known how the transaction ended."""
        producer = self._producer
        assert producer is not None, "start() comes first"
        begun = time.monotonic()
        try:
            await producer.begin_transaction()
            self._hook("begun")
            sent: list[asyncio.Future[Any]] = []
            for record in records:
                future = await producer.send(
                    record.topic, record.value, record.key, record.partition, headers=record.headers
                )
                # The first failure is raised below; without this asyncio would log each of the others.
                future.add_done_callback(_look)
                sent.append(future)
            await producer.send_offsets_to_transaction(dict(offsets), self._group)
            await asyncio.gather(*sent)
            self._hook("sent")
            await producer.commit_transaction()
            self._hook("committed")
        except (KafkaError, IllegalOperation) as error:
            # What send() says as soon as the background sender has failed; where it has not, the call is out of turn.
            failure = take_failure(producer) if isinstance(error, IllegalOperation) else error
            if not isinstance(failure, KafkaError):
                raise
            if isinstance(failure, _HOPELESS):
                raise failure from None
            young = time.monotonic() - begun < self._timeout_ms / 1000
            if young and isinstance(_root(failure), ProducerFenced | InvalidProducerEpoch):
                raise Fenced(f"another process uses the transactional id {self._transactional_id}") from failure
            return failure
        return None

    async def _look_for_heir(self, partitions: Iterable[TopicPartition], stamp: str) -> None:
        """Raises Fenced where there is one; a new start would fence it. Where the broker is away, that start waits."""
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS):
                # The broker may not have written the last commit's markers yet. An heir has waited for them.
                await self._is_committed(partitions, stamp, self._earlier)

    async def _is_committed(
        self, partitions: Iterable[TopicPartition], stamp: str, earlier: Mapping[TopicPartition, str] | None = None
    ) -> bool:
        """Whether the offsets carry this stamp. Raises Fenced where they carry neither it nor the one before, nor one
        of `earlier`."""
        stamps = {tp: _stamp(at) for tp, at in (await self._read(partitions)).items()}
        if all(value == stamp for value in stamps.values()):
            return True
        if any(value not in (stamp, self._stamps[tp], (earlier or {}).get(tp)) for tp, value in stamps.items()):
            raise Fenced(f"another process committed offsets of {self._group} as {self._transactional_id}")
        return False

    async def _start(self) -> None:
        await self.close()
        producer = AIOKafkaProducer(
            **connection_options(self._settings),
            transactional_id=self._transactional_id,
            transaction_timeout_ms=self._timeout_ms,
            compression_type=COMPRESSION,
            max_batch_size=BATCH_BYTES,
            max_request_size=self._settings.max_record_bytes + RECORD_OVERHEAD_BYTES,
        )
        self._producer = producer
        await producer.start()
        self._admin = AIOKafkaAdminClient(**connection_options(self._settings))
        await self._admin.start()

    async def _read(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata | None]:
        wanted = list(partitions)

        async def read() -> dict[TopicPartition, OffsetAndMetadata | None]:
            assert self._admin is not None, "start() comes first"
            found = await self._admin.list_consumer_group_offsets(self._group, partitions=wanted)
            # A coordinator that is still loading answers with an empty list and a top-level error, which aiokafka does
            # not look at. Taken for "no offsets" it would start everything again from the beginning.
            if set(found) != set(wanted):
                raise KafkaError(f"offsets of {len(found)} of {len(wanted)} partitions of {self._group}")
            return {tp: at if at.offset >= 0 else None for tp, at in found.items()}

        return await patiently(f"offsets of {self._group}", read)


def _stamp(at: OffsetAndMetadata | None) -> str:
    return "" if at is None else at.metadata.partition(" ")[0]


def _plain(at: OffsetAndMetadata) -> str:
    return at.metadata.partition(" ")[2]


def _look(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _root(error: BaseException) -> BaseException:
    """aiokafka's sender wraps what it did not expect into a KafkaError."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


async def patiently(what: str, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Does it again until the broker lets it succeed."""
    warned = -_WARN_SECONDS
    while True:
        attempt = asyncio.ensure_future(act())
        try:
            return await visibly(what, attempt)
        except _HOPELESS:
            raise
        except (KafkaError, TimeoutError) as error:
            if time.monotonic() - warned >= _WARN_SECONDS:
                warned = time.monotonic()
                logger.warning("%s: waiting for Kafka: %r", what, error)
            await asyncio.sleep(_BACKOFF_SECONDS)


async def visibly(what: str, attempt: asyncio.Future[T]) -> T:
    """Waits for it without a limit, saying so every few seconds: aiokafka itself retries in silence."""
    begun = time.monotonic()
    try:
        while not attempt.done():
            await asyncio.wait({attempt}, timeout=_WARN_SECONDS)
            if not attempt.done():
                logger.warning("%s: waiting for Kafka since %.0f s", what, time.monotonic() - begun)
    finally:
        attempt.cancel()
    return await attempt


async def _bounded(closing: Coroutine[Any, Any, None]) -> None:
    """aiokafka flushes when it closes, for as long as the broker is away."""
    try:
        await asyncio.wait_for(closing, _CLOSE_SECONDS)
    except (KafkaError, TimeoutError) as error:
        logger.debug("closing a Kafka client: %r", error)

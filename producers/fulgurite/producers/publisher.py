"""The asynchronous publisher: events to Kafka, in order, once, with a bounded buffer.

    caller ── publish ──► room in the buffer? ──► batch per partition ──► broker ── acks=all ──► acknowledgement
                              │ no: waits, then BufferFull                     │ refused, or given up: Undelivered

What it promises:
- `publish` returns as soon as the record has a place in the buffer; awaiting what it returns waits until the broker has
  the record on all in-sync replicas. Records one caller publishes one after the other to one key stay in that order.
- A broker that is away is waited for, for ever, visibly; a record is then sent again under the same sequence number, so
  the broker has it once. Callers feel it as a full buffer (`producer.buffer_records`, then BufferFull).
- accepted = delivered + failed + waiting, at any time. A record that failed is reported by its acknowledgement and by
  the next `flush` or `close`, which raise Undelivered; nothing is dropped silently and nothing is sent again under a
  new sequence number behind the caller's back (that could store it twice, or after its successors).
- An event over the bound kafka.max_record_bytes is refused (RecordTooLarge) before it is sent.
- Given rules of `redaction`, spans, rewards and dead letters leave this process redacted; bytes leave it as they are.

A batch the broker refuses leaves a gap in the partition's sequence numbers, after which the broker refuses everything
else from that producer id; aiokafka does not recover from it. So after a failure the producer inside is replaced, once
every record given to it has settled.

Does not know what the events mean, nor when an attempt is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError, UnknownTopicOrPartitionError
from aiokafka.structs import RecordMetadata
from pydantic import BaseModel

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.idempotent import abandon, connect
from fulgurite.producers.redaction import redactor
from fulgurite.producers.within import within
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, FulguriteError, RecordTooLarge, Undelivered
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.rollouts import RolloutEvent, RolloutEventBase
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import DEAD_LETTERS, REWARDS, ROLLOUTS, SPANS, Topic

logger = logging.getLogger(__name__)

Acknowledgement = asyncio.Future[RecordMetadata]
"""Done when the broker has the record (topic, partition, offset), or with Undelivered."""

Headers = Sequence[tuple[str, bytes]]


class Publisher:
    """Use as `async with Publisher(settings.kafka, settings.producer) as publisher`, from one event loop."""

    def __init__(
        self,
        kafka: KafkaSettings,
        producer: ProducerSettings | None = None,
        redaction: RedactionSettings | None = None,
    ) -> None:
        self._kafka = kafka
        self.redactor = redactor(redaction) if redaction is not None else None
        """For those who encode by themselves; None without rules."""
        self._settings = producer or ProducerSettings()
        self._producer: AIOKafkaProducer | None = None
        self._room = asyncio.Semaphore(self._settings.buffer_records)
        self._waiting: dict[asyncio.Future[RecordMetadata], Acknowledgement] = {}
        self._sending = 0
        self._progress = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None
        self._closed = False
        self._unreported = 0
        self._first_error: BaseException | None = None
        self._topics: dict[Topic, str] = {}
        self.delivered = 0
        """Records the broker acknowledged."""
        self.failed = 0
        """Records that were accepted and may not have reached the broker."""

    @property
    def waiting(self) -> int:
        """Records accepted and neither acknowledged nor failed."""
        return len(self._waiting)

    async def start(self) -> None:
        """Waits until a broker answers, for ever. Raises SettingsError when the brokers refuse our credentials."""
        self._producer = await connect(self._kafka, self._settings, first=True)

    def start_soon(self) -> asyncio.Task[None]:
        """Starts without waiting for a broker: until there is one, records wait as they do for one that went away. The
        task raises as `start`; `close` ends it."""
        self._renewal = asyncio.get_running_loop().create_task(self._first_producer())
        return self._renewal

    async def _first_producer(self) -> None:
        await self.start()
        self._renewal = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def publish(self, topic: Topic, key: str, event: BaseModel) -> Acknowledgement:
        """The event, as JSON. Raises RecordTooLarge, and BufferFull when there was no room in time.

        Here and below: TypeError for what is not the model; fields in a dict become one by `Span(**fields)`, which says
        what is wrong with them while their author can still see it.
        """
        expect(event, BaseModel)
        if self.redactor is not None:
            event = self.redactor.event(event)
        value = encode(event, self._kafka.max_record_bytes)
        return await self.publish_bytes(topic, encode_key(key), value)

    async def publish_span(self, span: Span) -> Acknowledgement:
        expect(span, Span)
        return await self.publish(SPANS, span.rollout_id, span)

    async def publish_reward(self, reward: Reward) -> Acknowledgement:
        expect(reward, Reward)
        return await self.publish(REWARDS, reward.rollout_id, reward)

    async def publish_rollout(self, event: RolloutEvent) -> Acknowledgement:
        expect(event, RolloutEventBase)
        return await self.publish(ROLLOUTS, event.rollout_id, event)

    async def publish_dead_letter(self, dead: DeadLetter) -> Acknowledgement:
        """The original bytes with the reason in headers. What would not fit into a record is cut, and says so."""
        expect(dead, DeadLetter)
        if self.redactor is not None:
            dead = self.redactor.dead_letter(dead)
        headers = dead.headers()
        bound = self._kafka.max_record_bytes - len(dead.key or b"") - _headers_bytes(headers)
        value = dead.value
        if value is not None and len(value) > bound:
            headers.append(("fulgurite.truncated_from_bytes", str(len(value)).encode()))
            value = value[: bound - _headers_bytes(headers[-1:])]
        return await self.publish_bytes(DEAD_LETTERS, dead.key, value, headers)

    async def publish_bytes(
        self, topic: Topic, key: bytes | None, value: bytes | None, headers: Headers = ()
    ) -> Acknowledgement:
        """A record as it is. Raises RecordTooLarge, and BufferFull when there was no room in time."""
        size = len(key or b"") + len(value or b"") + _headers_bytes(headers)
        if size > self._kafka.max_record_bytes:
            raise RecordTooLarge(
                f"the record for {topic.name} is {size} bytes with key and headers; "
                f"the bound kafka.max_record_bytes is {self._kafka.max_record_bytes}"
            )
        name = self._topics.get(topic) or self._topics.setdefault(topic, self._kafka.topic(topic))
        try:
            sent = await within(self._settings.buffer_wait_seconds, self._buffered(name, key, value, headers))
        except TimeoutError:
            raise BufferFull(self._why_no_room(name)) from None
        acknowledgement: Acknowledgement = sent.get_loop().create_future()
        self._waiting[sent] = acknowledgement
        sent.add_done_callback(self._settle)
        return acknowledgement

    async def _buffered(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers
    ) -> asyncio.Future[RecordMetadata]:
        await self._room.acquire()
        try:
            return await self._send(topic, key, value, headers)
        except BaseException:
            self._room.release()
            raise

    async def flush(self, timeout_seconds: float | None = None) -> None:
        """Waits until every record accepted so far is acknowledged, at most producer.delivery_seconds.

        Raises Undelivered with the number of those that failed since the last flush or still wait, and the first error.
        """
        bound = self._settings.delivery_seconds if timeout_seconds is None else timeout_seconds
        late = 0
        if self._waiting:
            _, pending = await asyncio.wait(set(self._waiting), timeout=bound)
            late = len(pending)
        self._report(late, bound)

    async def close(self, timeout_seconds: float | None = None) -> None:
        """Flushes, then disconnects; what the broker has not acknowledged by then is given up. Raises Undelivered."""
        if self._closed:
            return
        self._closed = True
        bound = self._settings.delivery_seconds if timeout_seconds is None else timeout_seconds
        if self._waiting:
            await asyncio.wait(set(self._waiting), timeout=bound)
        given_up = bool(self._waiting)
        if given_up:
            self._first_error = self._first_error or _not_in_time(bound)
        for sent in list(self._waiting):
            sent.cancel()
        await asyncio.sleep(0)  # lets the acknowledgements of cancelled records settle
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait({self._renewal})
        if self._producer is not None:
            await (abandon(self._producer) if given_up or self._sending else self._producer.stop())
        self._report(0, bound)

    async def _send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers
    ) -> asyncio.Future[RecordMetadata]:
        """Gives the record to aiokafka; waits while a producer is replaced or the partition's batch is full."""
        backoff = Backoff(logger)
        while True:
            while (renewal := self._renewal) is not None and not self._closed:
                await asyncio.wait({renewal})
                if not renewal.cancelled():
                    renewal.result()
            if self._producer is None or self._closed:
                raise FulguriteError("the publisher is not open: use it between start() and close()")
            self._sending += 1
            try:
                return await self._producer.send(topic, value=value, key=key, headers=headers)
            except (UnknownTopicOrPartitionError, TopicAuthorizationFailedError) as error:
                problem = f"topic {topic}: {error!r}"
            except KafkaError as error:
                # Raised for the batch this record waited behind: the record itself was not accepted.
                problem = f"cannot send to {topic}: {error!r}"
                self._renew()
            finally:
                self._sending -= 1
                self._progress.set()
            await backoff.wait(problem)

    def _settle(self, sent: asyncio.Future[RecordMetadata]) -> None:
        """Runs once for every accepted record, when its fate is known."""
        acknowledgement = self._waiting.pop(sent)
        self._room.release()
        self._progress.set()
        error = asyncio.CancelledError() if sent.cancelled() else sent.exception()
        if error is None:
            self.delivered += 1
            if not acknowledgement.done():
                acknowledgement.set_result(sent.result())
            return
        self.failed += 1
        self._unreported += 1
        self._first_error = self._first_error or error
        if not acknowledgement.done():
            acknowledgement.set_exception(Undelivered(1, self._first_error if sent.cancelled() else error))
            # Marks it as seen: flush and close report it even where nobody awaits it.
            acknowledgement.exception()
        if not sent.cancelled():
            self._renew()

    def _report(self, late: int, bound_seconds: float) -> None:
        failed, error = self._unreported, self._first_error
        self._unreported, self._first_error = 0, None
        if failed or late:
            raise Undelivered(failed + late, error or _not_in_time(bound_seconds))

    def _renew(self) -> None:
        if self._renewal is None and not self._closed:
            logger.warning("the broker refused records; replacing the producer")
            self._renewal = asyncio.get_running_loop().create_task(self._replace_producer())

    async def _replace_producer(self) -> None:
        """A new producer id, after all records of the old one have settled: so no record overtakes an earlier one."""
        while self._waiting or self._sending:
            self._progress.clear()
            await self._progress.wait()
        assert self._producer is not None
        await self._producer.stop()
        self._producer = await connect(self._kafka, self._settings)
        self._renewal = None

    def _why_no_room(self, topic: str) -> str:
        known = self._producer is not None and self._producer.client.cluster.partitions_for_topic(topic) is not None
        if self._producer is not None and not known:
            return f"the broker does not know topic {topic}: create the topics first (fulgurite topics)"
        return (
            f"no room for a record to {topic} within producer.buffer_wait_seconds = "
            f"{self._settings.buffer_wait_seconds:g}: {self.waiting} of producer.buffer_records = "
            f"{self._settings.buffer_records} wait for the broker at {self._kafka.bootstrap_servers}"
        )


def expect(event: object, kind: type) -> None:
    """Raises TypeError: bytes of another kind would be a dead letter in the topic, far from whoever made them."""
    if isinstance(event, kind):
        return
    wanted, maker = _WANTED.get(kind) or (f"a {kind.__name__}", kind.__name__)
    hint = f": {maker}(**fields) makes one of a dict" if isinstance(event, dict) else ""
    raise TypeError(f"the publisher takes {wanted}, not a {type(event).__name__}{hint}")


_WANTED: dict[type, tuple[str, str]] = {
    BaseModel: ("an event (a pydantic model)", "the model of its topic, such as Span"),
    RolloutEventBase: ("an event of a rollout", "the event's model, such as RolloutQueued"),
}
"""What to call it, and what makes one."""


def _headers_bytes(headers: Headers) -> int:
    return sum(len(name) + len(value) for name, value in headers)


def _not_in_time(bound_seconds: float) -> TimeoutError:
    return TimeoutError(f"no acknowledgement within {bound_seconds:g} s")

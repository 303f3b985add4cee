"""The publisher for threads and scripts: plain synchronous calls, the same guarantees.

    any thread ── publish ──► (encoded here) ──► one daemon thread with an event loop and a Publisher ──► broker

What it promises, beyond what `Publisher` does:
- `publish` returns when the record has a place in the buffer; `.result(seconds)` of what it returns waits for the
  broker.
- Nothing happens before the first record: no thread, no connection. A broker that is away then is waited for, at most
  producer.buffer_wait_seconds per call (BufferFull).
- At the interpreter's exit everything accepted is flushed, at most producer.delivery_seconds; what could not be
  delivered is printed on stderr. `close` (or leaving `with`) does the same and raises Undelivered. A process killed by
  a signal that Python does not handle (SIGTERM by default) exits without: close it, or handle the signal.
- A child made by fork starts afresh at its first record; what the parent had accepted stays the parent's.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from aiokafka.structs import RecordMetadata
from pydantic import BaseModel

from fulgurite.producers.publisher import Acknowledgement, Headers, Publisher, expect
from fulgurite.producers.redaction import redactor
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, FulguriteError, Undelivered
from fulgurite.schemas.redaction import RedactionSettings
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import REWARDS, SPANS, Topic

Delivery = Future[RecordMetadata]
"""`.result(seconds)` waits until the broker has the record; raises Undelivered."""

Send = Callable[[Publisher], Coroutine[Any, Any, Acknowledgement]]

CLOSE_MARGIN_SECONDS = 10.0
"""Beyond delivery_seconds, for giving up connections that do not answer."""

T = TypeVar("T")


class SyncPublisher:
    """May be used by many threads at once, not from within an event loop that must not block (see `Publisher`)."""

    def __init__(
        self,
        kafka: KafkaSettings,
        producer: ProducerSettings | None = None,
        redaction: RedactionSettings | None = None,
    ) -> None:
        self._kafka = kafka
        self._settings = producer or ProducerSettings()
        self._redactor = redactor(redaction) if redaction is not None else None
        self._reset()
        _alive.add(self)
        _flush_at_exit()

    def _reset(self) -> None:
        """The state of a process that has sent nothing. Also run in a forked child, whose other threads are gone."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def delivered(self) -> int:
        return self._worker.publisher.delivered if self._worker is not None else 0

    @property
    def failed(self) -> int:
        return self._worker.publisher.failed if self._worker is not None else 0

    @property
    def waiting(self) -> int:
        return self._worker.publisher.waiting if self._worker is not None else 0

    @property
    def max_record_bytes(self) -> int:
        return self._kafka.max_record_bytes

    def topic(self, topic: Topic) -> str:
        """The topic's full name on the broker."""
        return self._kafka.topic(topic)

    def publish(self, topic: Topic, key: str, event: BaseModel) -> Delivery:
        """The event, as JSON. Raises RecordTooLarge, and BufferFull when there was no room in time.

        Here and below, as in `Publisher`: TypeError for what is not the model; fields in a dict become one by
        `Span(**fields)`, which says what is wrong with them while their author can still see it.
        """
        expect(event, BaseModel)
        if self._redactor is not None:
            event = self._redactor.event(event)
        return self.publish_bytes(topic, encode_key(key), encode(event, self._kafka.max_record_bytes))

    def publish_span(self, span: Span) -> Delivery:
        expect(span, Span)
        return self.publish(SPANS, span.rollout_id, span)

    def publish_reward(self, reward: Reward) -> Delivery:
        expect(reward, Reward)
        return self.publish(REWARDS, reward.rollout_id, reward)

    def publish_dead_letter(self, dead: DeadLetter) -> Delivery:
        expect(dead, DeadLetter)
        if self._redactor is not None:
            dead = self._redactor.dead_letter(dead)
        return self.publish_all([lambda publisher: publisher.publish_dead_letter(dead)])[0]

    def publish_bytes(self, topic: Topic, key: bytes | None, value: bytes | None, headers: Headers = ()) -> Delivery:
        """A record as it is. Raises RecordTooLarge, and BufferFull when there was no room in time."""
        return self.publish_all([lambda publisher: publisher.publish_bytes(topic, key, value, headers)])[0]

    def publish_all(self, sends: Sequence[Send]) -> list[Delivery]:
        """Several records, in order, with one change of threads. Each send is a call of a Publisher's method.

        One that is refused (BufferFull, RecordTooLarge) raises; those before it are accepted.
        """
        worker = self._running_worker()
        return worker.call(worker.accept(sends))

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Waits until everything accepted so far is acknowledged. Raises Undelivered."""
        worker = self._worker
        if worker is not None and self._pid == os.getpid():
            worker.call(worker.publisher.flush(timeout_seconds))

    def close(self) -> None:
        """Flushes, disconnects, ends the thread. Raises Undelivered. Records published after it are refused."""
        with self._lock:
            worker, self._worker, self._closed = self._worker, None, True
        if worker is not None:
            worker.close()

    def _running_worker(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise FulguriteError("the publisher is closed")
            if self._worker is None:
                self._worker = _Worker(self._kafka, self._settings)
            return self._worker


class _Worker:
    """The thread, its event loop and the Publisher in it."""

    def __init__(self, kafka: KafkaSettings, settings: ProducerSettings) -> None:
        self._settings = settings
        self._bootstrap_servers = kafka.bootstrap_servers
        ready: Future[tuple[asyncio.AbstractEventLoop, Publisher]] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(kafka, ready)), name="fulgurite-publisher", daemon=True
        )
        self._thread.start()
        self._loop, self.publisher = ready.result()

    async def _main(self, kafka: KafkaSettings, ready: Future[tuple[asyncio.AbstractEventLoop, Publisher]]) -> None:
        publisher = Publisher(kafka, self._settings)
        self._done = asyncio.Event()
        self._starting = asyncio.create_task(publisher.start())
        ready.set_result((asyncio.get_running_loop(), publisher))
        await self._done.wait()

    async def accept(self, sends: Sequence[Send]) -> list[Delivery]:
        await asyncio.wait({self._starting}, timeout=self._settings.buffer_wait_seconds)
        if not self._starting.done():
            raise BufferFull(
                f"Kafka at {self._bootstrap_servers} did not answer within producer.buffer_wait_seconds = "
                f"{self._settings.buffer_wait_seconds:g}"
            )
        self._starting.result()
        return [_delivery(await send(self.publisher)) for send in sends]

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it in the loop and waits for it, from any other thread."""
        if threading.current_thread() is self._thread:
            work.close()
            raise FulguriteError("a SyncPublisher cannot be used from its own thread")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        try:
            self.call(self._close())
        finally:
            self._thread.join(CLOSE_MARGIN_SECONDS)

    async def _close(self) -> None:
        try:
            if not self._starting.done():
                self._starting.cancel()
                await asyncio.wait({self._starting})
            await self.publisher.close()
        finally:
            self._done.set()


def _delivery(acknowledgement: Acknowledgement) -> Delivery:
    """The same outcome, for threads."""
    delivery: Delivery = Future()

    def settle(done: Acknowledgement) -> None:
        if done.cancelled():
            delivery.set_exception(Undelivered(1, None))
        elif (error := done.exception()) is not None:
            delivery.set_exception(error)
        else:
            delivery.set_result(done.result())

    delivery.set_running_or_notify_cancel()  # a record once accepted cannot be taken back
    acknowledgement.add_done_callback(settle)
    return delivery


_alive: weakref.WeakSet[SyncPublisher] = weakref.WeakSet()
_registered = False
_orphans: list[object] = []


def _flush_at_exit() -> None:
    """Registers the flush once a process, at its first publisher.

    Plain `atexit` comes too late: by then asyncio's name resolution has lost its thread pool, so that a broker named by
    host could not be reached again; and it does not run at all in children of `multiprocessing`. The hook that
    concurrent.futures uses comes before, while everything still works.
    """
    global _registered
    if _registered:
        return
    _registered = True
    # The hook of its thread pool must be registered before ours: they run in reverse.
    importlib.import_module("concurrent.futures.thread")
    register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
    register(_close_all)


def _close_all() -> None:
    for publisher in list(_alive):
        try:
            publisher.close()
        except Undelivered as error:
            sys.stderr.write(f"fulgurite: at exit: {error}\n")  # logging may be gone by now


def _restart_in_child() -> None:
    for publisher in list(_alive):
        # The parent's objects must not be collected here: their sockets are the parent's too.
        _orphans.append(publisher._worker)  # pyright: ignore[reportPrivateUsage]
        publisher._reset()  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restart_in_child)

"""What one attempt has produced and the broker has not acknowledged yet: emitted from anywhere, flushed before the end.

    agent (coroutine or thread) ── put ──► outbox (bounded) ── one task, in order ──► publisher ──► acknowledgements
                                                                                     flush waits for all of them ◄──┘

Promises: `put` never blocks and may be called from any thread; records reach the log in the order of `put`; `flush`
returns only when everything put before it is acknowledged, else it raises Undelivered; a broker that is away is waited
for. An event that is too large to be a record becomes a dead letter and the others go on. Does not know when the
attempt is over.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import BaseModel

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.publisher import Acknowledgement, Publisher
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, FulguriteError, RecordTooLarge, Undelivered
from fulgurite.schemas.topics import Topic

logger = logging.getLogger(__name__)

MAX_WAITING_RECORDS = 4_096
"""Of one attempt. Reached only while the broker is away or an agent runs wild; then `put` raises BufferFull."""

MAX_WAITING_BYTES = 64 * 1024 * 1024
"""The same in bytes."""

KEPT_ACKNOWLEDGEMENTS = 1_024
"""Beyond it those that arrived are forgotten: an attempt may emit for a day."""

DEAD_LETTER_BYTES = 64 * 1024
"""How much of an event that is too large is kept in its dead letter: enough to see what it was."""

_Send = Callable[[], Coroutine[Any, Any, Acknowledgement]]


class Outbox:
    """Of one attempt. Made in the event loop that the publisher lives in."""

    def __init__(
        self,
        publisher: Publisher,
        topic_name: Callable[[Topic], str],
        max_record_bytes: int,
        redactor: Redactor | None = None,
    ) -> None:
        self._publisher = publisher
        self._redactor = redactor
        self._topic_name = topic_name
        self._max_record_bytes = max_record_bytes
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._lock = threading.Lock()
        self._queue: deque[tuple[int, _Send]] = deque()
        self._waiting_bytes = 0
        self._allowance = 0
        self._closed = False
        self._sender: asyncio.Task[None] | None = None
        self._acknowledgements: list[Acknowledgement] = []
        self._failed = 0
        self._first_error: BaseException | None = None

    def put(self, topic: Topic, key: str, event: BaseModel) -> None:
        """Accepts the event. Raises BufferFull when too much waits for the broker."""
        if self._redactor is not None:
            event = self._redactor.event(event)
        try:
            value = encode(event, self._max_record_bytes)
        except RecordTooLarge as error:
            self._put_dead_letter(topic, key, event, error)
            return
        self._enqueue(len(value), lambda: self._publisher.publish_bytes(topic, encode_key(key), value))

    def allow(self, records: int) -> None:
        """Makes room for this many more, whatever waits: what the runner adds at the end must never be refused."""
        with self._lock:
            self._allowance += records

    async def flush(self) -> None:
        """Waits until everything put so far is acknowledged. Raises Undelivered: how many were not, and why."""
        self._start()
        while self._sender is not None:
            await asyncio.shield(self._sender)
        acknowledgements, self._acknowledgements = self._acknowledgements, []
        results = await asyncio.gather(*acknowledgements, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        failed = self._failed + len(errors)
        first_error = self._first_error or (errors[0] if errors else None)
        self._failed, self._first_error = 0, None
        if failed:
            raise Undelivered(failed, first_error)

    def close(self) -> None:
        """Refuses everything from now on, and drops what was not sent: the attempt is over, nobody counts on it.

        An agent's thread that could not be stopped may still try to emit.
        """
        with self._lock:
            self._closed = True
            self._queue.clear()
        if self._sender is not None:
            self._sender.cancel()

    def _put_dead_letter(self, topic: Topic, key: str, event: BaseModel, error: RecordTooLarge) -> None:
        dead = DeadLetter(
            topic=self._topic_name(topic),
            partition=-1,
            offset=-1,
            stage="runner",
            reason=error.reason,
            message=f"{error}; the first {DEAD_LETTER_BYTES} bytes are kept",
            key=encode_key(key),
            value=event.model_dump_json().encode()[:DEAD_LETTER_BYTES],
        )
        self._enqueue(DEAD_LETTER_BYTES, lambda: self._publisher.publish_dead_letter(dead))

    def _enqueue(self, size: int, send: _Send) -> None:
        with self._lock:
            if self._closed:
                raise FulguriteError("the attempt is over: nothing more can be emitted for it")
            if len(self._queue) >= MAX_WAITING_RECORDS or self._waiting_bytes + size > MAX_WAITING_BYTES:
                if self._allowance == 0:
                    raise BufferFull(
                        f"{len(self._queue)} records ({self._waiting_bytes} bytes) of this attempt wait for Kafka; "
                        f"the bounds are {MAX_WAITING_RECORDS} and {MAX_WAITING_BYTES}"
                    )
                self._allowance -= 1
            self._queue.append((size, send))
            self._waiting_bytes += size
        if threading.get_ident() == self._loop_thread:
            self._start()
        else:
            self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        if self._sender is None and self._queue:
            self._sender = self._loop.create_task(self._send_all())

    async def _send_all(self) -> None:
        try:
            while self._queue:
                with self._lock:
                    size, send = self._queue.popleft()
                    self._waiting_bytes -= size
                await self._send_one(send)
        finally:
            self._sender = None

    async def _send_one(self, send: _Send) -> None:
        backoff = Backoff(logger)
        while True:
            try:
                acknowledgement = await send()
            except BufferFull as error:  # the broker is away: its return is waited for
                await backoff.wait(str(error))
            except FulguriteError as error:
                self._failed += 1
                self._first_error = self._first_error or error
                return
            else:
                break
        if len(self._acknowledgements) >= KEPT_ACKNOWLEDGEMENTS:
            self._acknowledgements = [one for one in self._acknowledgements if not one.done() or one.exception()]
        self._acknowledgements.append(acknowledgement)

"""A recording's way to the log: nothing counts as recorded before the broker has acknowledged it. Bounded in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.recording import Recorder, Recording
from fulgurite.producers.publisher import Acknowledgement
from fulgurite.producers.within import settled, within
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, RecordTooLarge
from fulgurite.schemas.spans import Span

logger = logging.getLogger(__name__)

STOP_SECONDS: Final = 1.0
"""For the span of a call that a stop interrupts, and for telling its agent: what is published by then is flushed."""


class SpanPublisher(Protocol):
    """What the gateway needs of a publisher."""

    async def publish_span(self, span: Span) -> Acknowledgement: ...

    async def publish_dead_letter(self, dead: DeadLetter) -> Acknowledgement: ...


class Log:
    """Where recordings go."""

    def __init__(
        self,
        publisher: SpanPublisher,
        recorder: Recorder,
        publish_seconds: float,
        unrecorded: Callable[[], None] | None = None,
    ) -> None:
        """With `unrecorded` a call that could not be recorded is answered all the same, and counted by it."""
        self._publisher = publisher
        self._recorder = recorder
        self._seconds = publish_seconds
        self._unrecorded = unrecorded

    async def publish(self, call: Call, recording: Recording) -> None:
        """Returns when the broker has all of it, else raises ApiError(503): or not, by gateway.answer_unrecorded."""
        try:
            await self._publish(call, recording)
        except ApiError as error:
            if self._unrecorded is None:
                raise
            logger.warning("call %s of rollout %s is NOT recorded: %s", call.span_ids[0], call.rollout_id, error)
            self._unrecorded()

    async def _publish(self, call: Call, recording: Recording) -> None:
        until = time.monotonic() + self._seconds
        try:
            sent = await within(self._seconds, self._send(call, recording))
        except (TimeoutError, BufferFull):
            raise self._unacknowledged() from None
        # No timeout around them: it would cancel acknowledgements, and a record may still arrive.
        if not await settled(sent, until - time.monotonic()):
            raise self._unacknowledged()
        for acknowledgement in sent:
            if problem := acknowledgement.exception():
                logger.warning("a span was not delivered: %r", problem)
                raise self._unacknowledged() from problem

    async def _send(self, call: Call, recording: Recording) -> list[Acknowledgement]:
        sent: list[Acknowledgement] = []
        dead_letters = list(recording.dead_letters)
        for index, span in enumerate(recording.spans):
            try:
                sent.append(await self._publisher.publish_span(span))
            except RecordTooLarge as error:
                small = self._recorder.too_large(call, recording, index, error)
                sent += [await self._publisher.publish_span(rest) for rest in small.spans]
                if not dead_letters:  # one a call: the answer is one
                    dead_letters += small.dead_letters
        for dead in dead_letters:
            # Not its message: that may be a backend's words, which quote prompts.
            logger.warning("dead letter (%s), span %s", dead.reason, call.span_ids[0])
            sent.append(await self._publisher.publish_dead_letter(dead))
        return sent

    def _unacknowledged(self) -> ApiError:
        message = (
            f"the broker did not acknowledge the call's span within {self._seconds:g} s (gateway.publish_seconds); "
            "ask again"
        )
        return ApiError(503, "broker_unavailable", message)

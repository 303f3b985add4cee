"""A streamed answer: events pass on as they arrive, its end waits for the broker (the contract is in `app.py`).

    backend ──► event ──► folded into the Outcome ──► passed on, stripped
                   └──► the end of the answer ──► held ──► recorded, acknowledged ──► passed on

Promises: nothing is read of the backend while the agent's connection is full, so a slow agent costs what the sockets
hold, and one that takes nothing for gateway.silence_seconds counts as gone, also at the end; what is held is bounded. A
backend that says only comments for that long is silent. An answer that breaks off before any event has passed is asked
for again, of another replica first, and that try is recorded nowhere. One that breaks off later has a span of its own,
and an error event in place of its end; so has one that is cancelled, since the gateway stops (STOP_SECONDS for each).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from starlette.types import Receive, Send

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.answers import refusal_of
from fulgurite.producers.gateway.asking import Asked, ask_for, ask_unchanged, read_all, served_by
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import BROKEN, AgentGone, ApiError, interrupted
from fulgurite.producers.gateway.exchange import Ask, Backends, Exchange
from fulgurite.producers.gateway.grammars import Grammars
from fulgurite.producers.gateway.http import EventStream, Gone, Present
from fulgurite.producers.gateway.protocols.base import Stream, invalid, unreadable
from fulgurite.producers.gateway.publishing import STOP_SECONDS, Log
from fulgurite.producers.gateway.recording import Recorder, Recording
from fulgurite.producers.gateway.stream_run import Run, is_whole
from fulgurite.producers.gateway.token_asking import UNSERVED, unserved
from fulgurite.producers.gateway.token_asking import ask_for as ask_for_tokens
from fulgurite.producers.gateway.token_flow import TokenRoute
from fulgurite.producers.gateway.token_route import GENERATE, shaping, streamed_request
from fulgurite.producers.gateway.token_stream import Translation
from fulgurite.producers.within import in_its_own_task
from fulgurite.schemas.settings import GatewaySettings

logger = logging.getLogger(__name__)

REFUSED: Final = frozenset({400, 422})
"""Of a provider that may not know stream_options: it is asked once more without them. Of a prompt by tokens."""
TAIL_SECONDS: Final = 0.2
"""After its last event a backend closes the stream: waited for, so that its connection can be used again. In all,
whatever else it says."""


class Streaming:
    """Answers streamed calls."""

    def __init__(
        self,
        settings: GatewaySettings,
        backends: Backends,
        recorder: Recorder,
        log: Log,
        spent: Callable[[Call, Recording], None],
        tokens: TokenRoute,
        grammars: Grammars,
    ) -> None:
        self._tokens = tokens
        self._grammars = grammars
        self._silence_seconds = settings.silence_seconds
        self._backends = backends
        self._recorder = recorder
        self._log = log
        self._spent = spent

    async def answer(self, call: Call, deadline: float, receive: Receive, send: Send) -> None:
        """Steps 2 to 5. Raises ApiError only while nothing was passed on, and AgentGone. Cancelled, it is recorded and
        told as interrupted, and raises CancelledError then."""
        run = Run(call, EventStream(send))
        try:
            await self._answer(run, deadline, receive)
        except asyncio.CancelledError:
            await in_its_own_task(self._interrupt(run))
            raise

    async def _interrupt(self, run: Run) -> None:
        """What is left to do of a call that was cancelled."""
        failure = interrupted()
        with suppress(ApiError, TimeoutError):
            if not run.recorded:  # else it is with the publisher, which is flushed
                async with asyncio.timeout(STOP_SECONDS):
                    await self._record_and_publish(run, failure)
        with suppress(ApiError, TimeoutError):
            if run.out.begun and not run.last_sent:
                async with asyncio.timeout(STOP_SECONDS):
                    await self._send_last(run, run.call.api.error_event(failure))

    async def _answer(self, run: Run, deadline: float, receive: Receive) -> None:
        call = run.call
        failure: ApiError | None = None
        try:
            async with Present(receive):  # 2
                ask = await self._by_tokens(run, deadline)
                if ask is None or not await self._relayed(run, ask):
                    await self._relay_chat(run, deadline)
        except ApiError as error:
            failure = error
        except Gone:
            failure = AgentGone("client_disconnected", "the agent closed its connection within its answer")
        failure = await self._record_and_publish(run, failure)
        if failure is None:
            await self._send_last(run, b"".join(run.held))  # 5
            if run.translation and run.stream:
                await self._tokens.remember_stream(call, run.translation, run.stream.outcome, deadline)
            else:
                self._tokens.asked_by_text(call, run.served)
        elif run.out.begun and not isinstance(failure, AgentGone):
            logger.info("a stream ended with an error: %s", failure.code)
            await self._send_last(run, call.api.error_event(failure))
        else:
            if run.served and failure.of_backend:
                failure.passed = run.served.headers
            raise failure

    async def _record_and_publish(self, run: Run, failure: ApiError | None) -> ApiError | None:
        """Steps 3 and 4. What the agent is told in place of its answer's end."""
        if run.served:
            run.served.seconds = run.call.seconds()
        recording, failure = self._recorded(run, failure)  # 3
        run.recorded = True
        self._spent(run.call, recording)
        try:
            await self._log.publish(run.call, recording)  # 4
        except ApiError as error:
            failure = error
        return failure

    async def _send_last(self, run: Run, events: bytes) -> None:
        """Raises AgentGone when the agent does not take it: its place is not held for that."""
        run.last_sent = True
        try:
            async with asyncio.timeout(self._silence_seconds):
                await run.out.send(events, last=True)
        except TimeoutError:
            raise _stalled() from None

    async def _by_tokens(self, run: Run, deadline: float) -> Ask | None:
        """What to ask for the answer by token ids; None where it is asked of the chat route."""
        if not await self._tokens.takes(run.call, deadline):
            return None
        asked = Asked()
        try:
            prepared = await self._tokens.prepare(run.call, deadline, asked)
        except ApiError:
            run.served = asked.served
            raise
        if prepared is None:
            return None
        run.translation = Translation(run.call, prepared)
        return ask_for_tokens(run.call, GENERATE, streamed_request(prepared.request), deadline)

    async def _relay_chat(self, run: Run, deadline: float) -> None:
        run.translation = None
        call = run.call
        async with self._grammars.asked(call, deadline) as grammar:
            if not await self._relayed(run, ask_for(call, deadline)):
                await self._relayed(run, ask_unchanged(call, deadline))
            await grammar.put_into(run.served)

    async def _relayed(self, run: Run, ask: Ask) -> bool:
        """Whether this could be asked; what is left to be asked otherwise has had no effect."""
        answers = self._backends.open(ask)
        async with answers as exchange:
            while True:
                if run.translation and exchange.status in UNSERVED:
                    self._tokens.is_unserved(run.call, unserved(run.call, exchange, ask.route))
                    return False
                if run.translation and exchange.status in REFUSED:
                    return False  # of these tokens; the chat route says what is wrong, if anything is
                if exchange.kind == "openai" and exchange.status in REFUSED and _adds(ask, run.call):
                    return False
                try:
                    await self._relay(run, exchange)
                    exchange.succeeded()
                    return True
                except ApiError as error:
                    if run.translation and run.translation.wordless and not run.out.begun:
                        self._tokens.is_unserved(run.call, unserved(run.call, exchange, ask.route, "without text"))
                        run.begin_anew()
                        return False
                    if not run.is_of_backend(exchange, error):
                        raise
                    await answers.blame(error.code, reported=error.reported)
                    if run.out.begun or not answers.may_ask_again(str(error), reported=error.of_backend):
                        raise
                run.begin_anew()
                exchange = await answers.again()

    async def _relay(self, run: Run, exchange: Exchange) -> None:
        """Step 2: until the answer is whole. Raises ApiError for an end of another kind."""
        run.served = served = served_by(exchange)
        if run.translation:
            served.sampling = shaping(run.translation.prepared.rendered)
        run.out.headers = served.headers
        if exchange.status != 200:
            raise refusal_of(exchange, await read_all(exchange))
        if not sse.is_stream(exchange.headers.get("content-type", "")):
            run.rejected = await read_all(exchange)
            raise invalid("is no stream, though one was asked for")
        stream = run.stream = run.call.api.stream(run.call.body, strip=exchange.kind == "vllm")
        try:
            await self._pass_on(run, stream, exchange)
        finally:
            unclosed = run.close(stream)
        if unclosed:
            raise unclosed
        if not stream.complete:
            raise ApiError(502, BROKEN, "the backend's stream ended before its answer did")
        served.version_after = await exchange.version_after()

    async def _pass_on(self, run: Run, stream: Stream, exchange: Exchange) -> None:
        """All events of the answer. The exchange bounds how long a backend says nothing, and the whole; the timer the
        agent's pauses, and what comes after the end."""
        loop = asyncio.get_running_loop()
        parser = sse.Parser()
        quiet_since = loop.time()
        tail_ends_at: float | None = None
        try:
            async with asyncio.timeout(None) as timer:
                async for chunk in exchange.chunks():
                    events = parser.feed(chunk)
                    passed, failure = run.fold(stream, events)
                    if passed:
                        timer.reschedule(loop.time() + self._silence_seconds)
                        if not run.out.begun:
                            exchange.works()
                        await run.out.send(passed)
                        timer.reschedule(tail_ends_at)
                    if failure:
                        raise failure
                    if stream.ended and tail_ends_at is None:
                        tail_ends_at = loop.time() + TAIL_SECONDS
                        timer.reschedule(tail_ends_at)
                    if any(event.data for event in events):
                        quiet_since = loop.time()
                    elif not stream.ended and loop.time() - quiet_since > self._silence_seconds:
                        raise self._quiet()
                timer.reschedule(loop.time() + self._silence_seconds)
                await self._pass_rest(run, stream, parser)
        except TimeoutError:
            if not stream.ended:
                raise _stalled() from None
        except ApiError:
            if not stream.ended:  # else it broke where nothing was left to come
                raise

    @staticmethod
    async def _pass_rest(run: Run, stream: Stream, parser: sse.Parser) -> None:
        """A last event without a blank line, where it is a whole one: half of one is of a backend that broke off."""
        rest = [] if stream.ended else [event for event in parser.end() if is_whole(event)]
        passed, failure = run.fold(stream, rest)
        if passed:
            await run.out.send(passed)
        if failure:
            raise failure

    def _recorded(self, run: Run, failure: ApiError | None) -> tuple[Recording, ApiError | None]:
        """(what is recorded, what the agent is told in place of its answer's end)."""
        try:
            return self._record(run, failure), failure
        except Exception as error:
            if run.served is None:
                raise
            found = unreadable(error)
            return self._recorder.unreadable(run.call, run.served, b"".join(run.held), found), failure or found

    def _quiet(self) -> ApiError:
        message = f"the backend sent no event for {self._silence_seconds:g} s (gateway.silence_seconds)"
        return ApiError(504, "backend_timeout", message)

    def _record(self, run: Run, failure: ApiError | None) -> Recording:
        call, served, stream = run.call, run.served, run.stream
        if failure and (served is None or stream is None):
            if served and run.rejected is not None:
                return self._recorder.unreadable(call, served, run.rejected, failure)
            return self._recorder.failed(call, failure, served)
        assert served
        assert stream
        if failure is None or (isinstance(failure, AgentGone) and stream.complete):
            return self._recorder.answered(call, served, stream.outcome)
        return self._recorder.interrupted(call, served, stream.outcome, failure, run.rejected)


def _adds(ask: Ask, call: Call) -> bool:
    """Whether a provider is asked more than the agent asked."""
    return ask.body_for == call.body_for and call.api.for_provider(call.body) is not None


def _stalled() -> AgentGone:
    return AgentGone("client_stalled", "the agent stopped taking its answer")

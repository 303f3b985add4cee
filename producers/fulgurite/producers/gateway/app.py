"""The gateway's HTTP side: one chat completion from the agent's request to its answer, and the routes around it.

    agent ── POST …/v1/chat/completions ──► 1 check ──► 2 ask ──► policy server
                                                           │ tokens, logprobs, versions
      ◄── 5 answer ◄── acknowledged ◄── 4 publish ◄── 3 record

The contract, and what a crash of this process after each step leaves:
1. Check ids, size and body. Refused requests are answered at once and are no calls. Crash: nothing happened.
2. Ask the backend, again while it is away, for at most gateway.backend_seconds. Crash: tokens nobody saw and nobody
   recorded; the agent sees a broken connection and may ask again.
3. Make the span: exactly what the backend says it sampled. Failed calls make one too. Crash: as 2.
4. Publish it and wait for the broker's acknowledgement, at most gateway.publish_seconds, then 503. Crash, or 503: the
   span may be on the log although the agent never saw the answer. If the agent asks again, the log has both calls, with
   span ids of their own: that is what happened. OpenAI's clients count their retries; the count is recorded, and the
   assembler leaves the call out that was given up. From a client that does not count, both calls look wanted.
5. Answer, without what the agent did not ask for. So every answer an agent has is on the log, before it has it.

An agent that hangs up during 2 ends the generation, and the span says so. Prompts, answers and keys are never logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import orjson
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from fulgurite.producers.gateway.answers import backend_error, parse_completion, stripped
from fulgurite.producers.gateway.backend import Answer, Backend
from fulgurite.producers.gateway.calls import Call, Sequences, parse_call
from fulgurite.producers.gateway.errors import ApiError, Headers
from fulgurite.producers.gateway.recording import Recorder, Recording
from fulgurite.producers.publisher import Acknowledgement
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, RecordTooLarge
from fulgurite.schemas.settings import GatewaySettings
from fulgurite.schemas.spans import Span

logger = logging.getLogger(__name__)

HEALTH_SECONDS: Final = 2.0
"""Longest that one side of a health check may take."""
DRAIN_BYTES: Final = 64 * 1024 * 1024
"""A refused body is read up to here: a client that is still sending would see a reset instead of the 413."""

Check = Callable[[], Awaitable[str]]
"""A health check: empty when well, else what is wrong."""


class SpanPublisher(Protocol):
    """What the gateway needs of a publisher."""

    async def publish_span(self, span: Span) -> Acknowledgement: ...

    async def publish_dead_letter(self, dead: DeadLetter) -> Acknowledgement: ...


class _Gone(Exception):
    """The agent closed its connection."""


class Gateway:
    """One process's gateway. Its methods are ASGI endpoints."""

    def __init__(self, settings: GatewaySettings, backend: Backend, publisher: SpanPublisher, broker: Check) -> None:
        self._settings = settings
        self._backend = backend
        self._publisher = publisher
        self._broker = broker
        self._recorder = Recorder(settings)
        self._sequences = Sequences()
        self._running = 0

    def app(self) -> Starlette:
        base = "/rollout/{rollout_id}/attempt/{attempt_id}"
        routes = [
            Route(f"{prefix}{path}", _Endpoint(handler, method))
            for prefix in (base, "")
            for path, method, handler in (
                ("/v1/chat/completions", "POST", self._chat),
                ("/v1/models", "GET", self._models),
            )
        ]
        routes.append(Route("/health", _Endpoint(self._health, "GET")))
        routes.append(Route("/{path:path}", _Endpoint(_not_found, None)))

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncGenerator[None]:
            logger.info("ready; backend %s, resource %s", self._settings.backend_url, self._settings.resource)
            yield

        return Starlette(routes=routes, lifespan=lifespan)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._running >= self._settings.max_concurrent_requests:
            bound = self._settings.max_concurrent_requests
            raise ApiError(429, "too_many_requests", f"{bound} calls are under way (gateway.max_concurrent_requests)")
        self._running += 1
        try:
            headers = _headers(scope)
            body = await _read_body(receive, headers, self._settings.max_body_bytes)
            call = parse_call(scope["path_params"], headers, body, self._sequences)  # 1
            answer = await self._complete(call, receive)
        finally:
            self._running -= 1
        await _respond(send, 200, answer)  # 5

    async def _complete(self, call: Call, receive: Receive) -> bytes:
        """Steps 2 to 4. The body for the agent; raises ApiError for every other outcome, which is recorded as well."""
        answer: Answer | None = None
        try:
            answer = await _unless_gone(self._backend.complete(call), receive)  # 2
            if answer.status != 200:
                raise backend_error(answer)
        except ApiError as error:
            await self._publish(call, answer, self._recorder.failed(call, error, answer))
            raise
        except _Gone:
            error = ApiError(499, "client_disconnected", "the agent closed its connection before the answer")
            await self._publish(call, answer, self._recorder.failed(call, error))
            raise
        try:
            response = parse_completion(answer)
        except ApiError as error:
            await self._publish(call, answer, self._recorder.unreadable(call, answer, error))
            raise
        await self._publish(call, answer, self._recorder.answered(call, answer, response))  # 3, 4
        return stripped(call, response)

    async def _publish(self, call: Call, answer: Answer | None, recording: Recording) -> None:
        """Step 4: returns when the broker has all of it, else raises ApiError(503)."""
        seconds = self._settings.publish_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                sent = await self._send(call, answer, recording)
            # Not asyncio.wait_for: it would cancel the acknowledgement, and the record may still arrive.
            done, pending = await asyncio.wait(sent, timeout=deadline - asyncio.get_running_loop().time())
        except (TimeoutError, BufferFull):
            raise _unacknowledged(seconds) from None
        if pending:
            raise _unacknowledged(seconds)
        for acknowledgement in done:
            if problem := acknowledgement.exception():
                logger.warning("a span was not delivered: %r", problem)
                raise _unacknowledged(seconds) from problem

    async def _send(self, call: Call, answer: Answer | None, recording: Recording) -> list[Acknowledgement]:
        sent: list[Acknowledgement] = []
        dead_letters = list(recording.dead_letters)
        for index, span in enumerate(recording.spans):
            try:
                sent.append(await self._publisher.publish_span(span))
            except RecordTooLarge as error:
                small = self._recorder.too_large(call, answer, index, error)
                sent += [await self._publisher.publish_span(rest) for rest in small.spans]
                dead_letters += small.dead_letters
        for dead in dead_letters:
            logger.warning("dead letter (%s): %s", dead.reason, dead.message)
            sent.append(await self._publisher.publish_dead_letter(dead))
        return sent

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, body = await self._backend.models(_headers(scope).get("authorization", ""))
        await _respond(send, status, body)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        broker, backend = await asyncio.gather(self._broker(), self._backend.health(HEALTH_SECONDS))
        report = {
            "status": "unhealthy" if broker or backend else "ok",
            "broker": broker or "ok",
            "backend": backend or "ok",
        }
        await _respond(send, 503 if broker or backend else 200, orjson.dumps(report))


class _Endpoint:
    """An ASGI endpoint that answers its ApiErrors in OpenAI's shape."""

    def __init__(self, handler: Callable[[Scope, Receive, Send], Awaitable[None]], method: str | None) -> None:
        self._handler = handler
        self._method = method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._method and scope["method"] != self._method:
                raise ApiError(405, "method_not_allowed", f"use {self._method}")
            await self._handler(scope, receive, send)
        except ApiError as error:
            await _respond(send, error.status, error.body(), error.headers())
        except _Gone:
            return  # nobody is there to answer


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    message = (
        f"no route {scope['path'][:200]}: the base URL is <gateway>/rollout/<rollout_id>/attempt/<attempt_id>/v1, "
        "and chat/completions and models are served"
    )
    raise ApiError(404, "not_found", message)


async def _unless_gone(asking: Awaitable[Answer], receive: Receive) -> Answer:
    """What `asking` gives. Raises _Gone, and stops asking, when the agent hangs up first."""
    work = asyncio.ensure_future(asking)
    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise _Gone
    finally:
        work.cancel()
        gone.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(receive: Receive, headers: dict[str, str], limit: int) -> bytes:
    """The whole body. Raises ApiError(413) over `limit` bytes, after the client has sent it."""
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        part = message.get("body", b"")
        more = message.get("more_body", False) and size <= DRAIN_BYTES
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    if size > limit:
        said = headers.get("content-length", "more")
        raise ApiError(413, "body_too_large", f"the body is {said} bytes; the bound gateway.max_body_bytes is {limit}")
    return b"".join(parts)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _respond(send: Send, status: int, body: bytes, extra: Headers | None = None) -> None:
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(extra or []),
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _unacknowledged(seconds: float) -> ApiError:
    message = (
        f"the broker did not acknowledge the call's span within {seconds:g} s (gateway.publish_seconds); ask again"
    )
    return ApiError(503, "broker_unavailable", message)

"""The gateway's HTTP side: one call of the model from the agent's request to its answer, and the routes around it.

    agent ── POST …/v1/chat/completions ──► 1 check ──► 2 ask ──► a backend
                                                           │ tokens, logprobs, versions
      ◄── 5 answer ◄── acknowledged ◄── 4 publish ◄── 3 record

The contract, and what a crash of this process after each step leaves:
1. Check ids, key, bounds, size and body. Refused requests are answered at once and are no calls. Crash: nothing
   happened.
2. Ask a backend, again or another while nobody answers or an answer breaks off, for at most gateway.backend_seconds
   until the first byte; who was asked by then, and is well, has gateway.answer_seconds for an answer that comes whole.
   A chat completion by token ids where a backend takes them (`token_flow.py`).
   Crash: tokens nobody saw and nobody recorded; the agent sees a broken connection and may ask again.
3. Make the span: exactly what the backend says it sampled. Failed calls make one too. Crash: as 2.
4. Publish it and wait for the broker's acknowledgement, at most gateway.publish_seconds, then 503. Crash, or 503: the
   span may be on the log although the agent never saw the answer. If the agent asks again, the log has both calls, with
   span ids of their own: that is what happened. OpenAI's clients count their retries; the count is recorded, and the
   assembler leaves the call out that was given up. From a client that does not count, both calls look wanted.
   With gateway.answer_unrecorded the call is answered instead of the 503, and nobody may ever know of it.
5. Answer, without what the agent did not ask for. So every answer an agent has is on the log, before it has it.

A streamed call (`streaming.py`) passes each event on during 2, as it arrives; its end (what says that the answer is
finished, and whatever follows) waits for 4. So an agent that saw the end of its stream has its call on the log; of one
that did not, the log may have the call, or the span of a broken one, or nothing (a crash). What goes wrong once events
have passed is told by an error event in place of the end, as the protocol's clients know it.

An agent that hangs up during 2 ends the generation, and the span has what came until then (`recording.py`). So does a
stop of the gateway, once the time is over that the server gives to calls under way: those that are left are cancelled,
recorded as `interrupted`, and told so. Prompts, answers and keys are never logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import orjson
from starlette.types import Receive, Scope, Send

from fulgurite.producers.gateway.answers import ensure_count, ensure_not_aborted, parse_answer, refusal_of
from fulgurite.producers.gateway.asking import Asked, ask_for, read_all, served_by, until_whole
from fulgurite.producers.gateway.budgets import Budgets, allowed_seconds
from fulgurite.producers.gateway.calls import Call, Sequences, identify, model_of, parse_call
from fulgurite.producers.gateway.errors import Aborted, AgentGone, ApiError, Headers, interrupted
from fulgurite.producers.gateway.exchange import Ask, Backends, Exchange
from fulgurite.producers.gateway.grammars import Grammars
from fulgurite.producers.gateway.health import Check, Health
from fulgurite.producers.gateway.hosts import Hosts
from fulgurite.producers.gateway.http import Gone, Present, headers_of, read_body, respond
from fulgurite.producers.gateway.keys import Keys
from fulgurite.producers.gateway.metrics import Metrics
from fulgurite.producers.gateway.passing import added, headers_from
from fulgurite.producers.gateway.protocols import BY_ROUTE
from fulgurite.producers.gateway.protocols.base import Api, invalid, to_bytes, unreadable, where
from fulgurite.producers.gateway.publishing import STOP_SECONDS, Log, SpanPublisher
from fulgurite.producers.gateway.recording import Recorder, Recording
from fulgurite.producers.gateway.routes import split
from fulgurite.producers.gateway.streaming import Streaming
from fulgurite.producers.gateway.token_flow import Sampled, TokenRoute
from fulgurite.producers.within import in_its_own_task
from fulgurite.schemas.settings import GatewaySettings

logger = logging.getLogger(__name__)

UNRECORDED: Final = {"/v1/messages/count_tokens": BY_ROUTE["/v1/messages"]}
"""Nothing is sampled there, so nothing is recorded: what agents ask beside their calls. And whose shape errors have."""


class Pool(Backends, Protocol):
    """What the gateway needs of its backends."""

    metrics: Metrics

    async def models(self, authorization: str) -> list[dict[str, Any]]:
        """What all of them serve, as /v1/models describes it. Raises ApiError(503)."""
        ...

    async def health(self, timeout_seconds: float) -> str:
        """Empty when one can be asked, else what is wrong."""
        ...


class Gateway:
    """One process's gateway, an ASGI application."""

    def __init__(self, settings: GatewaySettings, backends: Pool, publisher: SpanPublisher, broker: Check) -> None:
        self._settings = settings
        self._backends = backends
        self._metrics = backends.metrics
        self._recorder = Recorder()
        unrecorded = self._metrics.unrecorded.inc if settings.answer_unrecorded else None
        self._log = Log(publisher, self._recorder, settings.publish_seconds, unrecorded)
        self._hosts = Hosts(settings, self._metrics.refused)
        self._keys = Keys(settings.api_keys)
        self._budgets = Budgets(settings.max_rollout_tokens)
        self._tokens = TokenRoute(backends, backends.metrics, enabled=settings.exact_prompts)
        self._grammars = Grammars(backends)
        self._streaming = Streaming(
            settings, backends, self._recorder, self._log, self._spent, self._tokens, self._grammars
        )
        self._sequences = Sequences()
        # Those that wait are the pool's to bound; here it is the memory that bodies and answers take.
        self._most = settings.max_concurrent_requests + settings.max_queued_requests
        self._running = 0
        self._health = Health(broker, backends.health)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway speaks HTTP, not {scope['type']}")
        ids, route = split(scope["path"])
        api = BY_ROUTE.get(route)
        try:
            self._hosts.check(scope["headers"])
            if api:
                _ensure_method(scope, "POST")
                await self._call(api, ids, scope, receive, send)
            elif route in UNRECORDED:
                _ensure_method(scope, "POST")
                await self._count(route, ids, scope, receive, send)
            elif route == "/v1/models":
                _ensure_method(scope, "GET")
                await self._models(ids, scope, send)
            elif route == "/health" and not ids:
                _ensure_method(scope, "GET")
                report = await self._health.report()
                await respond(send, 200 if report["status"] == "ok" else 503, orjson.dumps(report))
            else:
                raise _no_route(scope["path"])
        except (AgentGone, Gone):
            return  # nobody is there to answer
        except ApiError as error:
            await respond(send, error.status, _error_body(route, error), added(error.headers(), error.passed))
        except asyncio.CancelledError:  # the server stops; its task ends here
            stopping = interrupted()
            with suppress(RuntimeError):  # as below
                await respond(send, stopping.status, _error_body(route, stopping), stopping.headers())
        except Exception as error:
            logger.error("a call failed within the gateway: %s", where(error))
            failed = ApiError(500, "internal_error", "the gateway failed; its log says where")
            with suppress(RuntimeError):  # where the answer has begun, nothing more can be said
                await respond(send, failed.status, _error_body(route, failed))

    async def _call(self, api: Api, ids: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        asked = Asked()
        try:
            caller = identify(ids, headers, scope.get("query_string", b""))
            with self._admitted(), self._keys.held(caller.key) as holder:
                self._metrics.asked_with(holder)
                self._budgets.check(caller.rollout_id)
                deadline = self._deadline(headers, self._settings.backend_seconds)
                whole_deadline = self._deadline(headers, self._settings.answer_seconds)
                body = await read_body(receive, headers, self._settings.max_body_bytes, deadline)
                call = parse_call(api, caller, headers, body, self._sequences)  # 1
                if call.streamed:
                    await self._streaming.answer(call, deadline, receive, send)
                    return
                answer = await self._complete(call, deadline, whole_deadline, asked, receive)
        except ApiError as error:
            if not error.of_backend and not isinstance(error, AgentGone):
                self._metrics.refused(error.code)
            raise
        await respond(send, 200, answer, asked.served.headers if asked.served else None)  # 5

    def _deadline(self, headers: dict[str, str], seconds: float) -> float:
        """So many seconds from now, or as many as the agent waits: a slow body takes of its own time."""
        return asyncio.get_running_loop().time() + allowed_seconds(headers, seconds)

    @contextmanager
    def _admitted(self) -> Generator[None]:
        if self._running >= self._most:
            raise ApiError(429, "too_many_requests", f"{self._most} calls are under way (gateway.max_queued_requests)")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _spent(self, call: Call, recording: Recording) -> None:
        tokens = recording.tokens
        self._budgets.spent(call.rollout_id, tokens)
        self._metrics.spent_tokens.inc(tokens)

    async def _complete(
        self, call: Call, deadline: float, whole_deadline: float, asked: Asked, receive: Receive
    ) -> bytes:
        """Steps 2 to 4. The body for the agent; raises ApiError for every other outcome, which is recorded as well."""
        sampled: Sampled | None = None
        failure: ApiError | None = None
        answer = b""
        try:
            async with Present(receive):  # 2
                if await self._tokens.takes(call, deadline):
                    sampled = await self._tokens.sample(call, deadline, whole_deadline, asked)
                if sampled is None:
                    async with self._grammars.asked(call, deadline) as grammar:
                        answer = asked.sampled = await self._ask(call, ask_for(call, deadline, whole_deadline), asked)
                        await grammar.put_into(asked.served)
        except ApiError as error:
            failure = error
        except Gone:
            if not answer:  # else it is whole, and only what is said of it was waited for
                failure = AgentGone("client_disconnected", "the agent closed its connection before the answer")
        except asyncio.CancelledError:
            await in_its_own_task(self._interrupted(call, asked))
            raise
        served = asked.served
        if served:
            served.seconds = call.seconds()
        if failure or not served:
            failure = failure or invalid("is missing")
            recording = self._failed(call, failure, asked)
            self._spent(call, recording)
            await self._log.publish(call, recording)
            if served and failure.of_backend:
                failure.passed = served.headers
            raise failure
        try:
            response = sampled.response if sampled else parse_answer(answer)
            outcome = call.api.read(call.body, response)
            for_agent = answer
            if served.kind == "vllm" and not call.api.passes:
                call.api.strip(call.body, response)
                for_agent = to_bytes(response)
            recording = self._recorder.answered(call, served, outcome, answer)  # 3
        except Exception as error:
            failure = error if isinstance(error, ApiError) else unreadable(error)
            recording = self._recorder.unreadable(call, served, asked.sampled, failure)
            self._spent(call, recording)
            await self._log.publish(call, recording)
            raise failure from None
        self._spent(call, recording)
        await self._log.publish(call, recording)  # 4
        if sampled:
            self._tokens.remember(call, sampled)
        else:
            self._tokens.asked_by_text(call, served)
        return for_agent

    def _failed(self, call: Call, failure: ApiError, asked: Asked) -> Recording:
        """Of a call without an answer; what was sampled of one that its backend aborted."""
        try:
            if isinstance(failure, Aborted) and asked.served:
                outcome = call.api.read(call.body, failure.answer)
                return self._recorder.interrupted(call, asked.served, outcome, failure)
        except Exception as error:
            logger.error("an aborted answer could not be read: %s", where(error))
        return self._recorder.failed(call, failure, asked.served, asked.sampled)

    async def _interrupted(self, call: Call, asked: Asked) -> None:
        """Records a call that was cancelled before it had an answer."""
        recording = self._recorder.failed(call, interrupted(), asked.served, asked.sampled)
        self._spent(call, recording)
        with suppress(ApiError, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._log.publish(call, recording)

    async def _ask(self, call: Call, ask: Ask, asked: Asked) -> bytes:
        async def take(exchange: Exchange) -> bytes:
            asked.served = served = served_by(exchange)
            answer = await read_all(exchange)
            if exchange.status != 200:
                raise refusal_of(exchange, answer)
            ensure_not_aborted(call.api, exchange, answer)
            served.version_after = await exchange.version_after()
            return answer

        return await until_whole(self._backends.open(ask), take, asked)

    async def _count(self, route: str, ids: dict[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        caller = identify(ids, headers, scope.get("query_string", b""))
        with self._admitted(), self._keys.held(caller.key):
            deadline = self._deadline(headers, self._settings.backend_seconds)
            body = await read_body(receive, headers, self._settings.max_body_bytes, deadline)
            ask = Ask(
                model=model_of(body),
                route=route,
                body_for=lambda _: body,
                authorization=caller.authorization,
                pin=caller.rollout_id,
                deadline=deadline,
                headers=caller.headers,
                query=caller.query,
            )
            async with Present(receive):
                answer, passed = await until_whole(self._backends.open(ask), _counted)
        await respond(send, 200, answer, passed)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """A shutdown is over when the calls are that the server has cancelled: they are recorded then."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                with suppress(TimeoutError):
                    async with asyncio.timeout(2 * STOP_SECONDS + 0.5):
                        while self._running:  # noqa: ASYNC110 (an event would cost every call)
                            await asyncio.sleep(0.02)
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _models(self, ids: dict[str, str], scope: Scope, send: Send) -> None:
        caller = identify(ids, headers_of(scope))
        with self._keys.held(caller.key):
            models = await self._backends.models(caller.authorization)
        await respond(send, 200, orjson.dumps({"object": "list", "data": models}))


async def _counted(exchange: Exchange) -> tuple[bytes, Headers]:
    """(an answer to count_tokens, what passes of its head). Raises ApiError."""
    answer = await read_all(exchange)
    passed = headers_from(exchange.kind, exchange.headers)
    try:
        ensure_count(exchange, answer)
    except ApiError as error:
        error.passed = passed if error.of_backend else []
        raise
    return answer, passed


def _error_body(route: str, error: ApiError) -> bytes:
    """In the shape of the route's protocol."""
    api = BY_ROUTE.get(route) or UNRECORDED.get(route)
    return api.error_body(error) if api else error.body()


def _ensure_method(scope: Scope, method: str) -> None:
    if scope["method"] != method:
        raise ApiError(405, "method_not_allowed", f"use {method}")


def _no_route(path: str) -> ApiError:
    served = ", ".join(route.removeprefix("/v1/") for route in (*BY_ROUTE, *UNRECORDED, "/v1/models"))
    message = (
        f"no route {path[:200]}: the base URL is <gateway>/rollout/<rollout_id>/attempt/<attempt_id>/v1 (Anthropic's "
        f"clients: without /v1) or <gateway>/v1, and {served} are served"
    )
    return ApiError(404, "not_found", message)

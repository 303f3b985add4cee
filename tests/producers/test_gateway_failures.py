"""Replicas that answer with errors, providers that fail, answers that trickle: who is asked again, and what is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from prometheus_client import generate_latest

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.away import MAX_BROKEN_TRIES, MAX_PROVIDER_TRIES
from fulgurite.producers.gateway.pool import Pool
from fulgurite.schemas.settings import BackendSettings, GatewaySettings
from tests.producers.fake_answers import Sampled, chat, chat_events
from tests.producers.fake_backend import FakeBackend, breaks_at_once, never, with_status
from tests.producers.fake_policy_server import until
from tests.producers.gateway_support import MESSAGES, FakePublisher, ask, serving, well
from tests.producers.test_gateway_pool import ask as ask_pool
from tests.producers.test_gateway_pool import asked_by, fakes, pool_of, refused

ANSWER = {
    "id": "x",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}],
}
CALL = {"model": "policy", "messages": MESSAGES}
EVENT = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}\n\n'
DONE = b"data: [DONE]\n\n"


class behind:
    """A gateway before the backends; gives its URL and keeps what it published."""

    def __init__(self, *backends: BackendSettings, **values: Any) -> None:
        self.publisher = FakePublisher(max_bytes=1 << 30)
        self._settings = GatewaySettings(backends=list(backends), **values)

    async def __aenter__(self) -> str:
        self.pool = Pool(self._settings)
        await self.pool.__aenter__()
        with contextlib.suppress(TimeoutError):  # else the first calls find only those that were looked at so far
            await until(lambda: all(each["models"] for each in self.pool.state() if each["kind"] == "vllm"), 2.0)
        self.gateway = Gateway(self._settings, self.pool, self.publisher, well)
        self._serving = serving(self.gateway)
        return await self._serving.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self._serving.__aexit__(*error)
        await self.pool.__aexit__(*error)


def streamed(*parts: bytes, every: bytes = b"", seconds: float = 0.05) -> Any:
    """A stream of these parts, and then of the same one again and again."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        while every:
            await response.write(every)
            await asyncio.sleep(seconds)
        return response

    return answer


async def stream_of(url: str) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=CALL | {"stream": True}) as response,
    ):
        return response.status, await response.read()


async def test_a_replica_whose_engine_died_gets_next_to_nothing_of_the_traffic():
    async def works(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return web.json_response({"by": "1"})

    async with fakes(2) as (dead, good), pool_of(dead.settings(), good.settings()) as pool:
        dead.answer, good.answer = with_status(500), works
        limit = asyncio.Semaphore(8)

        async def one(number: int) -> str:
            async with limit:
                return await asked_by(pool, pin=str(number % 10) if number % 2 else "")

        assert set(await asyncio.gather(*(one(number) for number in range(100)))) == {"1"}
        assert dead.completions < 30
        assert pool.state()[0]["breaker"] != "closed"


async def test_a_500_that_every_replica_gives_is_told_in_its_own_words():
    async with fakes(2) as servers:
        for fake in servers:
            fake.answer = with_status(500)
        gateway = behind(*(fake.settings() for fake in servers), exact_prompts=False)
        async with gateway as url:
            await until(lambda: all(state["models"] for state in gateway.pool.state()))  # else one alone is known
            with pytest.raises(openai.InternalServerError, match="no") as caught:
                await ask(url)
        assert caught.value.status_code == 500
        assert [fake.completions for fake in servers] == [1, 1]
    (span,) = gateway.publisher.spans
    assert (span.status, span.attributes["fulgurite.backend_tries"]) == ("error", 2)


async def test_a_request_that_makes_servers_say_500_is_given_up():
    async with fakes(6) as servers, pool_of(*(fake.settings() for fake in servers)) as pool:
        for fake in servers:
            fake.answer = with_status(500)
        assert (await ask_pool(pool))[0] == 500
        assert sum(fake.completions for fake in servers) == MAX_BROKEN_TRIES
        assert {state["in_flight"] for state in pool.state()} == {0}


async def test_a_500_of_a_provider_is_its_answer():
    async with fakes(2) as servers, pool_of(*(fake.settings(kind="openai") for fake in servers)) as pool:
        for fake in servers:
            fake.answer = with_status(500)
        assert (await ask_pool(pool))[0] == 500
        assert sum(fake.completions for fake in servers) == 1


@pytest.mark.parametrize("status", [502, 504])
async def test_a_provider_that_may_have_worked_on_it_is_asked_once_more_only(status: int):
    async with FakeBackend(answer=with_status(status)) as provider:
        gateway = behind(provider.settings(kind="openai"), breaker_failures=1_000)
        async with gateway as url:
            with pytest.raises(openai.InternalServerError) as caught:
                await ask(url)
        assert caught.value.status_code == status
        assert provider.completions == MAX_PROVIDER_TRIES
    (span,) = gateway.publisher.spans
    assert span.attributes["fulgurite.backend_tries"] == MAX_PROVIDER_TRIES


async def test_a_provider_that_breaks_off_is_asked_once_more_only():
    async with FakeBackend(answer=breaks_at_once) as provider:
        async with pool_of(provider.settings(kind="openai"), breaker_failures=1_000) as pool:
            assert (await refused(pool)).code == "backend_broken"
        assert provider.completions == MAX_PROVIDER_TRIES


async def test_who_could_not_be_asked_is_told_with_the_number_of_tries():
    async with FakeBackend(answer=with_status(503)) as fake, pool_of(fake.settings()) as pool:
        error = await refused(pool, seconds=0.3)
    assert (error.status, error.code) == (503, "backend_unavailable")
    assert "status 503" in error.message
    assert "tries" in error.message


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer_has_an_end_however_it_trickles(streams: bool):
    async def spaces(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    answer = streamed(every=EVENT % (b"a", b"null")) if streams else spaces
    async with FakeBackend(answer=answer) as fake:
        gateway = behind(fake.settings(kind="openai"), answer_seconds=0.4)
        async with gateway as url, asyncio.timeout(5):
            if streams:
                _, body = await stream_of(url)
                assert b"gateway.answer_seconds" in body
            else:
                with pytest.raises(openai.InternalServerError, match=r"gateway\.answer_seconds"):
                    await ask(url)
            await until(lambda: fake.hung_up == 1)
    assert gateway.publisher.spans[0].attributes["error.type"] == "backend_timeout"


async def test_comments_do_not_end_a_silence():
    answer = streamed(EVENT % (b"a", b"null"), every=b": ping\n\n")
    async with FakeBackend(answer=answer) as fake:
        gateway = behind(fake.settings(kind="openai"), silence_seconds=0.4)
        async with gateway as url, asyncio.timeout(5):
            _, body = await stream_of(url)
            assert b"gateway.silence_seconds" in body
    assert gateway.publisher.spans[0].attributes["error.type"] == "backend_timeout"


async def test_what_comes_after_the_end_does_not_keep_the_agent_waiting():
    answer = streamed(EVENT % (b"a", b'"stop"'), DONE, every=b": ping\n\n")
    async with FakeBackend(answer=answer) as fake:
        gateway = behind(fake.settings(kind="openai"))
        async with gateway as url, asyncio.timeout(5):
            began = time.monotonic()
            _, body = await stream_of(url)
            assert body.endswith(DONE)
            assert time.monotonic() - began < 2
    assert gateway.publisher.spans[0].status == "ok"


async def test_an_agent_that_stalls_at_the_end_gives_its_place_back():
    answer = streamed(EVENT % (b"x" * 9_000_000, b"null"), EVENT % (b"b", b'"stop"'), DONE)
    async with FakeBackend(answer=answer) as fake:
        bounds = {"max_concurrent_requests": 1, "max_queued_requests": 0}
        gateway = behind(fake.settings(kind="openai"), silence_seconds=0.4, **bounds)
        async with gateway as url:
            body = b'{"model":"policy","messages":[{"role":"user","content":"2+2?"}],"stream":true}'
            writer = await connected(url, len(body), body)
            await until(lambda: gateway.publisher.spans)
            with pytest.raises(openai.RateLimitError):
                await ask(url)
            fake.answer = lambda _: _answered()
            await asyncio.sleep(0.6)
            await ask(url)
            writer.transport.abort()


async def connected(url: str, length: int, body: bytes, more: str = "") -> asyncio.StreamWriter:
    """Has sent a call, or a part of it, and reads nothing."""
    host = url.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n{more}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.reader = reader  # type: ignore[attr-defined]
    return writer


async def test_a_body_that_does_not_come_is_a_408_and_frees_its_place():
    async with FakeBackend() as fake:
        fake.answer = lambda _: _answered()
        gateway = behind(fake.settings(kind="openai"), max_concurrent_requests=1, max_queued_requests=1)
        async with gateway as url:
            slow = [await connected(url, 100, b"{", "x-request-timeout: 0.3\r\n") for _ in range(2)]
            assert (await stream_of(url))[0] == 429  # OpenAI's first client takes longer than the places are held
            await asyncio.sleep(0.5)
            await ask(url)
            for writer in slow:
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                said = await writer.reader.read()  # type: ignore[attr-defined]
                assert said.startswith(b"HTTP/1.1 408")
                assert b'"code":"request_timeout"' in said
                writer.close()
    assert [span.status for span in gateway.publisher.spans] == ["ok"]


async def _answered() -> web.StreamResponse:
    return web.json_response(ANSWER)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example:4750"}, "forbidden_host"),
        ({"host": "127.0.0.1.evil.example"}, "forbidden_host"),
        ({"origin": "https://evil.example"}, "forbidden_origin"),
        ({"origin": "null"}, "forbidden_origin"),
        ({"host": "localhost:1"}, ""),
        ({"host": "[::1]:4750"}, ""),
        ({"host": "agents.internal", "origin": "http://AGENTS.internal:80"}, ""),
        ({"origin": "http://app.localhost:3000"}, ""),
    ],
)
async def test_a_page_of_another_site_cannot_ask(headers: dict[str, str], code: str):
    async with FakeBackend() as fake:
        fake.answer = lambda _: _answered()
        gateway = behind(fake.settings(kind="openai"), url="http://agents.internal:4750")
        async with (
            gateway as url,
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", json=CALL, headers=headers) as response,
        ):
            answer = await response.json()
    assert (response.status, answer.get("error", {}).get("code", "")) == (403 if code else 200, code)
    counted = b'refused_requests_total{code="%s"} 1.0' % code.encode()
    assert (counted in generate_latest(gateway.pool.metrics.registry)) == bool(code)
    assert fake.completions == (not code)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_providers_error_keeps_what_its_clients_act_on(streams: bool):
    async def refuses(request: web.Request) -> web.StreamResponse:
        error = {"message": "slow down", "type": "tokens", "code": "rate_limit_exceeded", "param": None}
        headers = {"retry-after": "17", "x-should-retry": "false", "set-cookie": "a=b"}
        return web.json_response({"error": error}, status=429, headers=headers)

    async with FakeBackend(answer=refuses) as fake:
        gateway = behind(fake.settings(kind="openai"))
        async with gateway as url:
            with pytest.raises(openai.RateLimitError) as caught:
                await ask(url, stream=streams)
    error = caught.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    said = error.response.headers
    assert (said["retry-after"], said["x-should-retry"]) == ("17", "false")
    assert "set-cookie" not in said
    assert gateway.publisher.spans[0].attributes["error.type"] == "backend_error"


async def test_health_is_checked_once_however_many_ask():
    checks = 0

    async def broker() -> str:
        nonlocal checks
        checks += 1
        await asyncio.sleep(0.05)
        return ""

    async with FakeBackend() as fake:
        settings = GatewaySettings(backends=[fake.settings()])
        async with (
            Pool(settings) as pool,
            serving(Gateway(settings, pool, FakePublisher(), broker)) as url,
            aiohttp.ClientSession() as session,
        ):

            async def one() -> int:
                async with session.get(f"{url}/health") as response:
                    return response.status

            assert set(await asyncio.gather(*(one() for _ in range(20)))) == {200}
            assert await one() == 200
    assert checks == 1


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _delta(**delta: Any) -> bytes:
    return _data({"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


CREATED = _data({"type": "response.created", "response": {"id": "r"}})
STARTED = _data({"type": "message_start", "message": {"id": "m"}})
BLOCK = {"type": "content_block_start", "index": 0}


@pytest.mark.parametrize(
    ("route", "before", "first"),
    [
        ("chat/completions", [b": wait\n\n", _delta(role="assistant", content="")], _delta(content="a")),
        ("chat/completions", [_delta(role="assistant")], _delta(tool_calls=[{"index": 0, "id": "c"}])),
        ("completions", [b": wait\n\n"], _data({"id": "x", "choices": [{"index": 0, "text": "a"}]})),
        ("responses", [CREATED], _data({"type": "response.output_text.delta", "delta": "a"})),
        ("responses", [CREATED], _data({"type": "response.output_item.added", "item": {"type": "function_call"}})),
        ("messages", [STARTED, _data(BLOCK | {"content_block": {"type": "text", "text": ""}})], b""),
        ("messages", [STARTED], _data(BLOCK | {"content_block": {"type": "tool_use", "name": "f"}})),
    ],
)
async def test_the_first_token_is_text_or_a_tools_call(route: str, before: list[bytes], first: bytes):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in before:
            await response.write(event)
        await asyncio.sleep(0.3)
        text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
        await response.write(first or _data(text))
        await asyncio.sleep(0.3)
        return response

    async with FakeBackend(models=[], answer=answer) as provider:
        gateway = behind(provider.settings(kind="openai"))
        body = CALL | {"prompt": "x", "input": "x", "stream": True}
        async with (
            gateway as url,
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/{route}", json=body) as response,
        ):
            await response.read()
    (span,) = gateway.publisher.spans
    took, whole = span.attributes["gen_ai.response.time_to_first_chunk"], span.attributes["fulgurite.backend_seconds"]
    assert 0.3 <= took < whole - 0.1


class dying:
    """A stream that gives these parts and breaks off, or ends."""

    def __init__(self, *parts: bytes, breaks: bool) -> None:
        self._parts = parts
        self._breaks = breaks

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in self._parts:
            await response.write(part)
        if self._breaks:
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
        return response


def reported(code: int) -> bytes:
    return _data({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": code}}) + DONE


UNSEEN = _data({"choices": [{"index": 0, "delta": {}, "token_ids": []}]})
"""Nothing of it is the agent's."""
BROKEN_STREAMS = {
    "breaks": dying(breaks=True),
    "breaks after what is not passed on": dying(UNSEEN, breaks=True),
    "reports an error": dying(reported(500), breaks=False),
    "ends without an answer": dying(breaks=False),
}


async def well_streamed(request: web.Request) -> web.StreamResponse:
    asked = json.loads(await request.text())
    return await streamed(*chat_events(asked, Sampled([7, 7, 7], "1", gives_versions=True)))(request)


async def streams_of(url: str, count: int) -> list[tuple[int, bytes]]:
    """One rollout each, so that every replica has some."""

    async def one(session: aiohttp.ClientSession, number: int) -> tuple[int, bytes]:
        path = f"{url}/rollout/r{number}/attempt/a/v1/chat/completions"
        async with session.post(path, json=CALL | {"stream": True}) as response:
            return response.status, await response.read()

    async with aiohttp.ClientSession() as session:
        return [await one(session, number) for number in range(count)]


@pytest.mark.parametrize(
    ("how", "kind"), [*((how, "vllm") for how in BROKEN_STREAMS), ("breaks", "openai"), ("reports an error", "openai")]
)
async def test_a_stream_of_which_the_agent_has_nothing_is_asked_of_another_replica(how: str, kind: Any):
    async with fakes(2) as (bad, good):
        bad.answer, good.answer = BROKEN_STREAMS[how], well_streamed
        gateway = behind(*(fake.settings(kind=kind) for fake in (bad, good)), exact_prompts=False)
        async with gateway as url:
            await until(lambda: kind != "vllm" or all(state["models"] for state in gateway.pool.state()))
            answers = await streams_of(url, 20)
        assert {status for status, _ in answers} == {200}
        assert all(body.endswith(DONE) and b"error" not in body for _, body in answers)
        assert 0 < bad.completions < 20
        assert gateway.pool.state()[0]["in_flight"] == 0
    spans = gateway.publisher.spans
    assert {(span.endpoint, json.loads(span.output)["content"]) for span in spans} == {(good.url, "answer 0")}
    assert len(spans) == 20, "a try that was given up left something on the log"
    tries = [span.attributes.get("fulgurite.backend_tries", 1) for span in spans]
    assert tries.count(2) == bad.completions


@pytest.mark.parametrize(
    ("answer", "asked", "code"),
    [
        (dying(EVENT % (b"a", b"null"), breaks=True), 1, "backend_broken"),  # the agent has some of it
        (dying(reported(400), breaks=False), 1, "backend_error"),  # another would say the same
        (dying(reported(500), breaks=False), 2, "backend_error"),  # both said so
        (dying(breaks=True), MAX_BROKEN_TRIES, "backend_broken"),
    ],
)
async def test_what_no_replica_can_stream_is_told_once_and_recorded_once(answer: Any, asked: int, code: str):
    async with fakes(2) as servers:
        for fake in servers:
            fake.answer = answer
        gateway = behind(*(fake.settings() for fake in servers), exact_prompts=False)
        async with gateway as url:
            await until(lambda: all(state["models"] for state in gateway.pool.state()))
            ((_, body),) = await streams_of(url, 1)
        assert sum(fake.completions for fake in servers) == asked
        assert code.encode() in body
    (span,) = gateway.publisher.spans
    assert (span.status, span.attributes["error.type"]) == ("error", code)
    assert span.attributes.get("fulgurite.backend_tries", 1) == asked


@pytest.mark.parametrize("how", [dying(EVENT % (b"a", b"null"), breaks=True), dying(reported(500), breaks=False)])
async def test_streams_that_break_are_failures_in_a_row_although_their_heads_came(how: Any):
    async with fakes(2) as (bad, good):
        bad.answer, good.answer = how, well_streamed
        bounds: dict[str, Any] = {"breaker_failures": 3, "breaker_seconds": 30.0, "max_breaker_seconds": 30.0}
        gateway = behind(*(fake.settings() for fake in (bad, good)), exact_prompts=False, **bounds)
        async with gateway as url:
            await until(lambda: all(state["models"] for state in gateway.pool.state()))
            await streams_of(url, 16)
            assert [state["breaker"] for state in gateway.pool.state()] == ["open", "closed"]
        assert bad.completions == 3


async def test_an_answer_that_comes_whole_may_take_longer_than_a_first_byte():
    async def long(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.8)
        return web.json_response(ANSWER)

    async with fakes(2) as servers:
        bounds: dict[str, Any] = {"backend_seconds": 0.2, "breaker_failures": 1, "breaker_seconds": 30.0}
        bounds["max_breaker_seconds"] = 30.0
        policy, provider = servers[0].settings(), servers[1].settings(kind="openai", models=["other"])
        gateway = behind(policy, provider, exact_prompts=False, **bounds)
        bounded = behind(policy, provider, exact_prompts=False, answer_seconds=0.4, **bounds)
        async with gateway as url, bounded as bounded_url, aiohttp.ClientSession() as session:

            async def told(url: str, model: str, **headers: str) -> tuple[int, str]:
                path = f"{url}/v1/chat/completions"
                async with session.post(path, json=CALL | {"model": model}, headers=headers) as response:
                    return response.status, (await response.json()).get("error", {}).get("code", "")

            for fake in servers:
                fake.answer = long
            timeout = (504, "backend_timeout")
            impatient = {"x-request-timeout": "0.15"}
            asked = [told(url, "other"), told(url, "other", **impatient), told(bounded_url, "policy")]
            assert await asyncio.gather(*asked) == [(200, ""), timeout, timeout]
            assert [state["breaker"] for state in gateway.pool.state()] == ["closed", "closed"]
            assert [state["breaker"] for state in bounded.pool.state()] == ["closed", "closed"], "it is well"
            assert await told(bounded_url, "other") == timeout
            assert [state["breaker"] for state in bounded.pool.state()] == ["closed", "open"], "nobody says that it is"


async def test_who_is_not_well_is_not_waited_for_longer_than_for_a_first_byte():
    async def falls_ill(request: web.Request) -> web.StreamResponse:
        fake.health_status = 503
        return await never(request)

    async with FakeBackend(answer=falls_ill) as fake:
        gateway = behind(fake.settings(), exact_prompts=False, backend_seconds=0.5, health_seconds=0.05)
        async with gateway as url, asyncio.timeout(4):
            with pytest.raises(openai.InternalServerError) as caught:
                await ask(url)
    assert caught.value.status_code == 504


SENT = {
    "openai-organization": "org",
    "openai-project": "proj",
    "idempotency-key": "i1",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "tools-1",
    "x-request-id": "agents-1",
    "authorization": "Bearer of-the-agent",
    "cookie": "a=b",
    "x-forwarded-for": "10.0.0.1",
}
SAID = {
    "x-request-id": "r1",
    "request-id": "req_1",
    "x-ratelimit-remaining-requests": "7",
    "retry-after": "9",
    "set-cookie": "a=b",
    "server": "secret/1.0",
}


@pytest.mark.parametrize("how", ["whole", "stream", "refused"])
@pytest.mark.parametrize("kind", ["openai", "vllm"])
async def test_only_named_headers_pass_between_agent_and_backend(kind: Any, how: str):
    queries: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        queries.append(request.rel_url.raw_query_string)
        if how == "refused":
            return web.json_response({"error": {"message": "no"}}, status=400, headers=SAID)
        asked, sampled = json.loads(await request.text()), Sampled([7, 7, 7], "1", gives_versions=True)
        if how == "whole":
            return web.json_response(chat(asked, sampled), headers=SAID)
        response = web.StreamResponse(headers=SAID | {"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in chat_events(asked, sampled):
            await response.write(event)
        return response

    async with FakeBackend(answer=answer) as fake:
        gateway = behind(fake.settings(kind=kind), exact_prompts=False)
        async with gateway as url, aiohttp.ClientSession() as session:
            path = f"{url}/v1/chat/completions?api-version=2&key=sk-1&x=%20y"
            async with session.post(path, json=CALL | {"stream": how == "stream"}, headers=SENT) as response:
                await response.read()
    provided = kind == "openai"
    assert response.status == (400 if how == "refused" else 200)
    told = {name.lower(): value for name, value in response.headers.items()}
    passed = ["x-request-id", *(["request-id", "x-ratelimit-remaining-requests", "retry-after"] if provided else [])]
    assert {name: told[name] for name in SAID if name in told and told[name] == SAID[name]} == {
        name: SAID[name] for name in passed
    }
    names = [*SENT][:6] if provided else ["x-request-id"]
    assert {name: value for name, value in fake.headers[0].items() if name in SENT} == {
        name: SENT[name] for name in names
    }
    assert queries[0] == ("api-version=2&x=%20y" if provided else "")


async def test_a_request_that_is_asked_without_what_was_added_has_not_the_same_idempotency_key():
    async with FakeBackend(answer=with_status(400)) as fake:
        async with behind(fake.settings(kind="openai")) as url, aiohttp.ClientSession() as session:
            await session.post(f"{url}/v1/chat/completions", json=CALL | {"stream": True}, headers=SENT)
        assert [headers.get("idempotency-key") for headers in fake.headers] == ["i1", None]

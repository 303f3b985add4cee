"""A failure that a vLLM reports: its own, or of the request that it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from tests.producers.fake_answers import Sampled, chat, chat_events
from tests.producers.fake_backend import FakeBackend
from tests.producers.fake_policy_server import until
from tests.producers.gateway_support import MESSAGES
from tests.producers.test_gateway_failures import behind, dying, reported, streamed, streams_of
from tests.producers.test_gateway_pool import fakes

POISON = [{"role": "user", "content": "poison"}]
BOUNDS: dict[str, Any] = {"breaker_failures": 3, "breaker_seconds": 30.0, "max_breaker_seconds": 30.0}


def but_for_poison(fails: Callable[[web.Request, bool], Awaitable[web.StreamResponse]]) -> Any:
    """Answers whatever is asked, but one request."""

    async def answer(request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.text())
        stream = bool(asked.get("stream"))
        if asked["messages"] == POISON:
            return await fails(request, stream)
        sampled = Sampled([7, 7, 7], "1", gives_versions=True)
        if stream:
            return await streamed(*chat_events(asked, sampled))(request)
        return web.json_response(chat(asked, sampled))

    return answer


async def fails_well(request: web.Request, stream: bool) -> web.StreamResponse:
    """As a vLLM does whose grammar refused a token: 500, or an event that says so, and it goes on serving."""
    if stream:
        return await dying(reported(500), breaks=False)(request)
    return web.json_response({"error": {"message": "Internal server error", "code": 500}}, status=500)


async def said(url: str, messages: Any, *, stream: bool = False) -> tuple[int, bytes]:
    body = {"model": "policy", "messages": messages, "stream": stream}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        return response.status, await response.read()


def standing(gateway: behind) -> list[str]:
    return [state["breaker"] for state in gateway.pool.state()]


async def all_known(gateway: behind) -> None:
    await until(lambda: all(state["models"] for state in gateway.pool.state()))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_request_that_well_servers_fail_at_shuts_nobody_out(replicas: int, stream: bool):
    async with fakes(replicas) as servers:
        for fake in servers:
            fake.answer = but_for_poison(fails_well)
        gateway = behind(*(fake.settings() for fake in servers), exact_prompts=False, **BOUNDS)
        async with gateway as url:
            await all_known(gateway)
            for _ in range(5):
                status, body = await said(url, POISON, stream=stream)
                assert (status, b"error" in body) == (502 if stream else 500, True)
            assert standing(gateway) == ["closed"] * replicas
            assert (await said(url, MESSAGES))[0] == 200
            assert {state["in_flight"] for state in gateway.pool.state()} == {0}
        assert [fake.asked.count("/v1/chat/completions") >= 5 for fake in servers] == [True] * replicas


@pytest.mark.parametrize("stream", [False, True])
async def test_who_fails_at_what_another_answers_is_left_alone(stream: bool):
    """Although it says that it is well."""

    async def answers(request: web.Request) -> web.StreamResponse:
        return await but_for_poison(fails_well)(request)

    async with fakes(2) as (bad, good):
        bad.answer = lambda request: fails_well(request, stream)
        good.answer = answers
        gateway = behind(bad.settings(), good.settings(), exact_prompts=False, **BOUNDS)
        async with gateway as url:
            await all_known(gateway)
            for _ in range(8):
                assert (await said(url, MESSAGES, stream=stream))[0] == 200
            assert standing(gateway) == ["open", "closed"]
        assert bad.completions == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("health", [503, None])
async def test_who_fails_and_is_not_well_is_left_alone(health: int | None, stream: bool):
    """503: its engine died. None: it does not say."""

    async def dies(request: web.Request) -> web.StreamResponse:
        fake.health_status, fake.frozen = health or 200, health is None
        return await fails_well(request, stream)

    async with FakeBackend() as fake:
        fake.answer = dies
        one = BOUNDS | {"breaker_failures": 1}
        gateway = behind(fake.settings(), exact_prompts=False, health_seconds=30.0, **one)
        async with gateway as url:
            await all_known(gateway)
            assert (await said(url, MESSAGES, stream=stream))[0] == (502 if stream else 500)
            assert standing(gateway) == ["open"]


async def test_a_stream_that_fails_after_its_first_event_is_judged_alike():
    event = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    async with FakeBackend(answer=dying(event, reported(500), breaks=False)) as fake:
        gateway = behind(fake.settings(), exact_prompts=False, **BOUNDS)
        async with gateway as url:
            await all_known(gateway)
            await streams_of(url, 4)
            assert standing(gateway) == ["closed"]
            fake.health_status = 503
            await streams_of(url, 1)
        assert fake.completions == 5


async def test_an_agent_that_hangs_up_while_a_failure_is_judged_leaves_nothing_behind():
    async def freezes(request: web.Request) -> web.StreamResponse:
        fake.frozen = True
        return await fails_well(request, stream=False)

    async with FakeBackend(answer=freezes) as fake:
        gateway = behind(fake.settings(), exact_prompts=False, health_seconds=30.0)
        async with gateway as url:
            await all_known(gateway)
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=0.3) as agent:
                with pytest.raises(openai.APITimeoutError):
                    await agent.chat.completions.create(model="policy", messages=MESSAGES)
            await until(lambda: gateway.pool.state()[0]["in_flight"] == 0)
            await asyncio.sleep(0)
    assert [span.status for span in gateway.publisher.spans] == ["error"]

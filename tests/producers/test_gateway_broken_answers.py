"""Whole answers that break off: another replica is asked, since the agent has nothing of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, Literal

import aiohttp
import pytest
from aiohttp import web
from starlette.responses import Response, StreamingResponse

from fulgurite.producers.gateway.away import MAX_BROKEN_TRIES, MAX_PROVIDER_TRIES
from fulgurite.schemas.settings import BackendSettings
from tests.producers import fake_answers
from tests.producers.fake_answers import Sampled
from tests.producers.fake_backend import Answer
from tests.producers.gateway_support import MESSAGES
from tests.producers.test_gateway_failures import behind
from tests.producers.test_gateway_hostile import TokenServer
from tests.producers.test_gateway_pool import fakes
from tests.producers.test_gateway_token_replicas import BODY, GENERATE, rollout_of
from tests.producers.test_gateway_token_replicas import asked as asked_by_tokens

CALL: dict[str, Any] = {"model": "policy", "messages": MESSAGES, "prompt": "2+2?", "input": "2+2?"}
SAMPLED = Sampled([7, 7, 7], "1", gives_versions=True)
WHOLE: dict[str, Any] = {
    "chat/completions": fake_answers.chat,
    "completions": fake_answers.completion,
    "responses": fake_answers.response,
    "messages": fake_answers.message,
    "messages/count_tokens": lambda asked, sampled: {"input_tokens": 4},
}
STEADY: dict[str, Any] = {"breaker_seconds": 30.0, "max_breaker_seconds": 30.0}


def cut_off(*, after_seconds: float = 0.0) -> Answer:
    """Says how long its answer is, gives some of it, and dies."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "1000"})
        await asyncio.sleep(after_seconds)
        await response.prepare(request)
        await response.write(b'{"id": "x", "choices": [')
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.abort()
        return response

    return answer


async def answers(request: web.Request) -> web.StreamResponse:
    return web.json_response(WHOLE[request.path.removeprefix("/v1/")](json.loads(await request.text()), SAMPLED))


async def asked(url: str, number: int = 0, route: str = "chat/completions") -> tuple[int, Any]:
    path = f"{url}/rollout/r{number}/attempt/a/v1/{route}"
    async with aiohttp.ClientSession() as session, session.post(path, json=CALL) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize("route", WHOLE)
async def test_a_whole_answer_that_breaks_off_is_asked_of_another_replica(route: str, kind: Literal["vllm", "openai"]):
    async with fakes(2) as (bad, good):
        bad.answer, good.answer = cut_off(), answers
        backends = [fake.settings(kind=kind) for fake in (bad, good)]
        gateway = behind(*backends, exact_prompts=False, breaker_failures=3, **STEADY)
        async with gateway as url:
            assert [(await asked(url, number, route))[0] for number in range(12)] == [200] * 12
            assert [state["breaker"] for state in gateway.pool.state()] == ["open", "closed"]
            assert [state["in_flight"] for state in gateway.pool.state()] == [0, 0]
        broken = sum(path == f"/v1/{route}" for path in bad.asked)
        assert broken == 3, "as many as open its breaker"
    spans = gateway.publisher.spans
    if route != "messages/count_tokens":
        assert [(span.status, span.endpoint) for span in spans] == [("ok", good.url)] * 12
        assert [span.attributes.get("fulgurite.backend_tries", 1) for span in spans].count(2) == broken
    assert not gateway.publisher.dead


@pytest.mark.parametrize(("kind", "tries"), [("vllm", MAX_BROKEN_TRIES), ("openai", MAX_PROVIDER_TRIES)])
async def test_a_whole_answer_that_always_breaks_off_is_given_up_and_recorded_once(
    kind: Literal["vllm", "openai"], tries: int
):
    async with fakes(2) as servers:
        for fake in servers:
            fake.answer = cut_off()
        gateway = behind(*(fake.settings(kind=kind) for fake in servers), exact_prompts=False)
        async with gateway as url:
            status, answer = await asked(url)
        assert (status, answer["error"]["code"]) == (502, "backend_broken")
        assert sum(fake.completions for fake in servers) == tries
        assert {fake.completions for fake in servers} == {tries // 2}, "one after the other"
    (span,) = gateway.publisher.spans
    assert (span.status, span.attributes["error.type"]) == ("error", "backend_broken")
    assert span.attributes["fulgurite.backend_tries"] == tries


@pytest.mark.parametrize(("replicas", "status"), [(2, 200), (1, 502)])
async def test_after_the_time_for_a_first_byte_only_who_was_not_asked_is(replicas: int, status: int):
    """A whole answer may take longer than that, and break off then."""
    async with fakes(replicas) as servers:
        for fake in servers:
            fake.answer = answers
        servers[0].answer = cut_off(after_seconds=0.6)
        gateway = behind(*(fake.settings() for fake in servers), exact_prompts=False, backend_seconds=0.3)
        async with gateway as url:
            seen = {(await asked(url, number))[0] for number in range(6)}
            assert seen == {status}
        assert servers[0].completions > 0
        assert len(gateway.publisher.spans) == 6
        assert sum(fake.completions for fake in servers[1:]) == (6 if replicas == 2 else 0)


class Cut(TokenServer):
    """Its answers by token ids break off, or those of the route before."""

    def cut(self, route: str) -> None:
        async def half() -> AsyncGenerator[bytes]:
            yield b'{"choices": ['
            raise ConnectionAbortedError("as a server that dies")

        def fault() -> Response:
            return StreamingResponse(half(), media_type="application/json")

        self.faults[route] = fault


@pytest.mark.parametrize("route", [GENERATE, "/v1/chat/completions/render"])
async def test_an_answer_by_token_ids_that_breaks_off_is_asked_of_another_replica(route: str):
    async with Cut(label="1") as bad, TokenServer(label="1") as good:
        bad.cut(route)
        gateway = behind(BackendSettings(url=bad.url), BackendSettings(url=good.url))
        async with gateway as url:
            status, _ = await asked_by_tokens(url, rollout_of(bad, good), BODY)
        assert status == 200
        assert route in bad.log
        assert good.log.count(GENERATE) == 1
        assert "/v1/chat/completions" not in bad.log + good.log
    (span,) = gateway.publisher.spans
    assert (span.status, span.endpoint, span.response_token_ids) == ("ok", good.url, [5, 6])

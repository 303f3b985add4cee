"""Calls with tools by the chat route: whether the server held an answer to a grammar, which that route does not say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.token_route import RENDER
from fulgurite.schemas.settings import BackendSettings
from fulgurite.streams.assembler.join import sampled_neutrally
from tests.producers.fake_policy_server import until
from tests.producers.gateway_support import MESSAGES, FakePublisher, gateway
from tests.producers.test_gateway_failures import behind
from tests.producers.test_gateway_hostile import ATTEMPT, TOOLS, TokenServer, post
from tests.producers.test_gateway_token_replicas import asked, rollout_of

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "policy", "messages": MESSAGES, "tools": TOOLS, "stream": True}
ONE_CALL: dict[str, Any] = BODY | {"parallel_tool_calls": False}

TAG: dict[str, Any] = {"structural_tag": "{}"}


class HeldServer(TokenServer):
    structured = TAG


class Unscaled(TokenServer):
    """Without --enable-scale-out."""

    missing = frozenset({"render"})


class Waiting(HeldServer):
    """Renders when the test says so."""

    rendered: asyncio.Event

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        self.rendered = asyncio.Event()
        found = super().more_routes()
        (render,) = (handler for route, _, handler in found if route == RENDER)

        async def wait(request: Request) -> Response:
            await self.rendered.wait()
            return await render(request)

        return [(RENDER, "POST", wait), *(route for route in found if route[0] != RENDER)]


async def constraints_of(server: TokenServer, body: dict[str, Any], **settings: Any) -> Any:
    publisher = FakePublisher()
    async with server as backend, gateway(publisher, backend.url, **settings) as url:
        status, _ = await post(url, CHAT, body)
    assert status == 200
    assert CHAT in backend.log
    (span,) = publisher.spans
    assert span.status == "ok"
    return span.attributes.get("fulgurite.request.constraints")


@pytest.mark.parametrize(
    ("server", "body", "settings", "constraints"),
    [
        (HeldServer, BODY, {}, ["structured_outputs"]),  # as glm47 holds every call with tools
        (HeldServer, BODY | {"stream": False}, {"exact_prompts": False}, ["structured_outputs"]),
        (HeldServer, BODY | {"stream": False, "echo": True}, {}, ["structured_outputs"]),
        (TokenServer, ONE_CALL, {}, None),  # a parser without a grammar
        (Unscaled, ONE_CALL, {}, ["parallel_tool_calls"]),
        (Unscaled, BODY, {}, None),
    ],
)
async def test_a_call_by_the_chat_route_says_whether_a_grammar_held_it(
    server: type[TokenServer], body: dict[str, Any], settings: dict[str, Any], constraints: list[str] | None
):
    assert await constraints_of(server(label="1"), body, **settings) == constraints


@pytest.mark.parametrize(
    "more",
    [{"tools": None}, {"tool_choice": "none"}, {"temperature": 0.5}, {"response_format": {"type": "json_object"}}],
)
async def test_only_of_calls_that_could_be_trained_on_it_is_asked(more: dict[str, Any]):
    server = HeldServer(label="1")
    await constraints_of(server, BODY | more, exact_prompts=False)
    assert RENDER not in server.log


async def test_a_server_that_cannot_say_is_not_asked_with_every_call():
    async with Unscaled(label="1") as backend, gateway(FakePublisher(), backend.url, exact_prompts=False) as url:
        for _ in range(3):
            assert (await post(url, CHAT, BODY))[0] == 200
    assert backend.log.count(RENDER) == 1


async def test_a_server_that_fails_to_say_costs_no_answer():
    server = HeldServer(label="1")
    server.faults[RENDER] = lambda: JSONResponse({"error": {"message": "no"}}, status_code=429)
    assert await constraints_of(server, ONE_CALL) == ["parallel_tool_calls"]


async def test_where_it_is_not_said_the_last_word_counts():
    """A parser that holds every call does so with the next one."""
    publisher = FakePublisher()
    server = HeldServer(label="1")
    async with server as backend, gateway(publisher, backend.url) as url:
        await post(url, CHAT, BODY)
        server.faults[RENDER] = lambda: JSONResponse({"error": {"message": "no"}}, status_code=429)
        await post(url, CHAT, BODY)
    assert [span.attributes["fulgurite.request.constraints"] for span in publisher.spans] == [
        ["structured_outputs"]
    ] * 2


async def test_only_the_end_of_a_stream_waits_for_it():
    publisher = FakePublisher()
    async with (
        Waiting(label="1") as backend,
        gateway(publisher, backend.url) as url,
        aiohttp.ClientSession() as session,
    ):
        async with session.post(f"{url}{ATTEMPT}{CHAT}", data=orjson.dumps(BODY)) as answer:
            assert await asyncio.wait_for(answer.content.readline(), 5)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(answer.content.read(), 0.3)
            assert publisher.spans == []
            backend.rendered.set()
            assert b"[DONE]" in await answer.content.read()
        backend.rendered.clear()
        async with session.post(f"{url}{ATTEMPT}{CHAT}", data=orjson.dumps(BODY)) as answer:
            assert await answer.content.readline()  # and it hangs up
        await until(lambda: len(publisher.spans) == 2, 5)
        backend.rendered.set()
    assert [span.attributes["fulgurite.request.constraints"] for span in publisher.spans] == [
        ["structured_outputs"]
    ] * 2


async def test_agents_that_come_at_once_ask_once_and_all_are_told():
    """Of hardly more seats, and hardly more who may wait, than the calls themselves need."""
    publisher = FakePublisher()
    server = HeldServer(label="1")
    bounds = {"max_concurrent_requests": 4, "max_queued_requests": 60}
    async with server as backend, gateway(publisher, backend.url, **bounds) as url:
        found = await asyncio.gather(*(post(url, CHAT, BODY | {"user": str(number)}) for number in range(60)))
        assert [status for status, _ in found] == [200] * 60
        assert backend.log.count(RENDER) == 1
        other = [{"type": "function", "function": {"name": "other"}}]
        await post(url, CHAT, BODY | {"tools": other})
        await post(url, CHAT, BODY | {"tools": other, "messages": [*MESSAGES, *MESSAGES]})
        assert backend.log.count(RENDER) == 2
    constrained = [span.attributes.get("fulgurite.request.constraints") for span in publisher.spans]
    assert constrained == [["structured_outputs"]] * 62


async def test_a_server_that_lost_the_route_has_said_it_before():
    publisher = FakePublisher()
    server = HeldServer(label="1")
    async with server as backend, gateway(publisher, backend.url) as url:
        await post(url, CHAT, ONE_CALL)
        server.faults[RENDER] = lambda: JSONResponse({"error": {"message": "gone"}}, status_code=404)
        await post(url, CHAT, BODY)
        await post(url, CHAT, ONE_CALL)
    found = [span.attributes.get("fulgurite.request.constraints") for span in publisher.spans]
    assert found == [["structured_outputs"], None, ["structured_outputs"]]


async def test_a_whole_answer_is_kept_of_an_agent_that_does_not_wait_for_what_is_said_of_it():
    publisher = FakePublisher()
    async with (
        Waiting(label="1") as backend,
        gateway(publisher, backend.url, exact_prompts=False) as url,
        aiohttp.ClientSession() as session,
    ):
        body = orjson.dumps(BODY | {"stream": False})
        with pytest.raises(TimeoutError):
            await session.post(f"{url}{ATTEMPT}{CHAT}", data=body, timeout=aiohttp.ClientTimeout(0.5))
        await until(lambda: publisher.spans, 5)
        backend.rendered.set()
    (span,) = publisher.spans
    assert (span.status, len(span.response_token_ids)) == ("ok", len(span.logprobs))
    assert span.response_token_ids
    assert span.attributes["fulgurite.request.constraints"] == ["structured_outputs"], "nobody knows"


class Warm(HeldServer):
    """Holds calls with tools to a grammar, and samples with a temperature of its own."""

    sampling = MappingProxyType({"temperature": 0.6})


def other_form(name: str) -> dict[str, Any]:
    return BODY | {"tools": [{"type": "function", "function": {"name": name}}]}


@pytest.mark.parametrize(
    "said",
    [
        lambda: JSONResponse([[], [{"prompt_token_ids": [1, 2]}]]),
        lambda: JSONResponse({"detail": "Not Found"}, status_code=404),
    ],
)
async def test_a_replica_that_cannot_say_keeps_nobody_from_asking_another(said: Callable[[], Response]):
    async with Warm(label="1") as old, Warm(label="1") as good:
        old.faults[RENDER] = said
        replicas = behind(BackendSettings(url=old.url), BackendSettings(url=good.url))
        async with replicas as url:
            for number, (one, two) in enumerate([(old, good), (good, old), (old, good)]):
                assert (await asked(url, rollout_of(one, two), other_form(f"f{number}")))[0] == 200
        assert (old.log.count(RENDER), good.log.count(RENDER)) == (1, 3)
    for span in replicas.publisher.spans:
        assert span.attributes["fulgurite.request.constraints"] == ["structured_outputs"]
        assert not sampled_neutrally(span)


async def test_agents_of_all_replicas_that_come_at_once_are_told_by_the_one_that_can_say():
    async with Warm(label="1") as old, Warm(label="1") as good:
        old.missing = frozenset({"render"})
        replicas = behind(BackendSettings(url=old.url), BackendSettings(url=good.url))
        async with replicas as url:
            rollouts = [rollout_of(old, good), rollout_of(good, old)] * 10
            found = await asyncio.gather(*(asked(url, rollout, BODY) for rollout in rollouts))
            assert [status for status, _ in found] == [200] * 20
    assert not any(sampled_neutrally(span) for span in replicas.publisher.spans)


async def test_a_replica_that_comes_back_is_asked_what_the_others_could_not_say():
    """And while it is away no call waits for it."""
    async with Warm(label="1") as old, Warm(label="1") as good:
        old.missing = frozenset({"render"})
        good.faults["/health"] = lambda: Response(status_code=503)
        replicas = behind(BackendSettings(url=old.url), BackendSettings(url=good.url))
        async with replicas as url:
            for _ in range(2):
                async with asyncio.timeout(2):
                    assert (await asked(url, rollout_of(old, good), BODY))[0] == 200
            assert (old.log.count(RENDER), good.log.count(RENDER)) == (1, 0)
            del good.faults["/health"]
            await until(lambda: good.url in replicas.pool.endpoints("policy"))
            assert (await asked(url, rollout_of(old, good), BODY))[0] == 200
        assert (old.log.count(RENDER), good.log.count(RENDER)) == (1, 1)
    assert not sampled_neutrally(replicas.publisher.spans[-1])

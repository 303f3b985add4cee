"""Answers that a server aborts, being stopped or paused: whole as they look, they are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.away import MAX_BROKEN_TRIES
from fulgurite.producers.gateway.protocols.base import ENDS
from fulgurite.schemas.settings import BackendSettings
from tests.producers.fake_backend import FakeBackend
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES
from tests.producers.test_gateway_failures import DONE, EVENT, behind, dying, streamed, streams_of, well_streamed
from tests.producers.test_gateway_hostile import TOOLS, TokenServer
from tests.producers.test_gateway_pool import fakes
from tests.producers.test_gateway_token_replicas import BODY, GENERATE, rollout_of
from tests.producers.test_gateway_token_replicas import asked as asked_by_tokens

CALL: dict[str, Any] = {"model": "policy", "messages": MESSAGES, "prompt": "2+2?", "input": "2+2?"}
ROUTES = ("chat/completions", "completions", "responses", "messages")


def aborts(body: dict[str, Any]) -> dict[str, Any]:
    """The first choice, as vLLM says it; as a gpt-oss's server does of a response; without a word in a message."""
    if "choices" in body:
        body["choices"][0]["finish_reason"] = "abort"
    elif "content" in body:
        del body["stop_reason"]
    else:
        body["status"] = "cancelled"
    return body


def aborts_event(_: int, event: bytes) -> bytes:
    for end in (b'"finish_reason": "stop"', b'"finish_reason": "length"'):
        event = event.replace(end, b'"finish_reason": "abort"', 1)
    event = event.replace(b'"stop_reason": "end_turn"', b'"stop_reason": null')
    if b"response.completed" in event:
        event = event.replace(b'"status": "completed"', b'"status": "cancelled"')
    return event


async def asked(url: str, number: int = 0, route: str = "chat/completions", **fields: Any) -> tuple[int, bytes]:
    path = f"{url}/rollout/r{number}/attempt/a/v1/{route}"
    async with aiohttp.ClientSession() as session, session.post(path, json=CALL | fields) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("route", ROUTES)
async def test_an_aborted_answer_is_asked_of_another_replica(route: str):
    async with FakePolicyServer(label="1", mend=aborts) as bad, FakePolicyServer(label="1") as good:
        gateway = behind(*(BackendSettings(url=each.url) for each in (bad, good)), breaker_failures=1_000)
        async with gateway as url:
            answers = [await asked(url, number, route) for number in range(12)]
        assert {status for status, _ in answers} == {200}
        assert not any(b"abort" in body or b"cancelled" in body for _, body in answers)
        assert 0 < bad.log.count(f"/v1/{route}") < 12
    assert [(span.status, span.endpoint) for span in gateway.publisher.spans] == [("ok", good.url)] * 12
    assert not gateway.publisher.dead


@pytest.mark.parametrize("route", ROUTES)
async def test_an_answer_that_every_try_aborts_is_an_error_recorded_as_far_as_it_came(route: str):
    async with FakePolicyServer(weights=7, label="1", mend=aborts) as server:
        gateway = behind(BackendSettings(url=server.url))
        async with gateway as url:
            status, answer = await asked(url, route=route)
            assert (status, orjson.loads(answer)["error"]["code"]) == (502, "backend_broken")
            assert server.log.count(f"/v1/{route}") == MAX_BROKEN_TRIES
            assert [state["breaker"] for state in gateway.pool.state()] == ["closed"], "it is well, and says so"
    (span,) = gateway.publisher.spans
    assert (span.status, span.finish_reason, span.attributes["error.type"]) == ("error", "", "backend_broken")
    assert "aborted" in span.status_message
    assert "answer 0" in span.output
    assert span.response_token_ids == ([] if route == "messages" else [7, 7, 7])
    assert (span.input_tokens, span.output_tokens) == (4, 3)
    assert not gateway.publisher.dead


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_that_is_aborted_ends_with_an_error_event(route: str):
    async with FakePolicyServer(weights=7, label="1", mend_event=aborts_event) as server:
        gateway = behind(BackendSettings(url=server.url))
        async with gateway as url:
            status, body = await asked(url, route=route, stream=True)
        assert server.log.count(f"/v1/{route}") == 1, "the agent has some of it"
    assert status == 200
    assert b"backend_broken" in body
    assert not any(end in body for end in (b"[DONE]", b'"abort"', b"cancelled", b"message_stop"))
    (span,) = gateway.publisher.spans
    assert (span.status, span.finish_reason, span.attributes["error.type"]) == ("error", "", "backend_broken")
    assert "answer 0" in span.output
    assert not gateway.publisher.dead


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["responses", "messages"])
async def test_an_answer_without_a_token_was_aborted_whatever_it_calls_itself(route: str, stream: bool):
    async with FakePolicyServer(label="1", reply_tokens=0) as server:
        gateway = behind(BackendSettings(url=server.url))
        provided = behind(BackendSettings(url=server.url, kind="openai"))
        async with gateway as url, provided as provider_url:
            _, body = await asked(url, route=route, stream=stream)
            _, of_provider = await asked(provider_url, route=route, stream=stream)
    assert (b"backend_broken" in body, b"backend_broken" in of_provider) == (True, False)
    assert [span.status for span in (*gateway.publisher.spans, *provided.publisher.spans)] == ["error", "ok"]


ABORTED = b'data: {"choices":[{"index":0,"delta":{},"token_ids":[],"finish_reason":"abort"}]}\n\n'


async def test_a_stream_that_is_aborted_before_its_first_event_is_asked_of_another_replica():
    async with fakes(2) as (bad, good):
        bad.answer, good.answer = dying(ABORTED, DONE, breaks=False), well_streamed
        gateway = behind(*(fake.settings() for fake in (bad, good)), exact_prompts=False)
        async with gateway as url:
            await until(lambda: all(state["models"] for state in gateway.pool.state()))
            answers = await streams_of(url, 12)
        assert all(body.endswith(DONE) and b"error" not in body for _, body in answers)
        assert bad.completions > 0
    assert [(span.status, span.endpoint) for span in gateway.publisher.spans] == [("ok", good.url)] * 12


@pytest.mark.parametrize("stream", [False, True])
async def test_one_aborted_choice_makes_the_call_an_error(stream: bool):
    async with FakePolicyServer(weights=7, label="1", mend=aborts, mend_event=aborts_event) as server:
        gateway = behind(BackendSettings(url=server.url))
        async with gateway as url:
            status, body = await asked(url, n=2, stream=stream)
    assert (status, b"backend_broken" in body) == (200 if stream else 502, True)
    spans = gateway.publisher.spans
    assert [(span.status, span.finish_reason) for span in spans] == [("error", "")] * 2
    assert [span.attributes["fulgurite.choice"] for span in spans] == [0, 1]
    assert all(span.response_token_ids for span in spans)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_aborts_is_no_answer_either(stream: bool):
    events = streamed(EVENT % (b"a", b"null"), EVENT % (b"b", b'"abort"'), DONE)
    async with FakePolicyServer(mend=aborts) as whole, FakeBackend(answer=events) as in_events:
        gateway = behind(BackendSettings(url=in_events.url if stream else whole.url, kind="openai"))
        async with gateway as url:
            status, body = await asked(url, stream=stream)
    assert (status, b"backend_broken" in body) == (200 if stream else 502, True)
    assert [span.status for span in gateway.publisher.spans] == ["error"]


class Aborting(TokenServer):
    """Its answers by token ids are aborted."""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        found = super().more_routes()
        (generate,) = (handler for route, _, handler in found if route == GENERATE)

        async def aborted(request: Request) -> Response:
            answer = aborts(orjson.loads((await generate(request)).body))
            if not (await request.json()).get("stream"):
                return JSONResponse(answer)
            return Response(b"data: " + orjson.dumps(answer) + b"\n\n" + DONE, media_type="text/event-stream")

        return [(GENERATE, "POST", aborted), *(route for route in found if route[0] != GENERATE)]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}])
async def test_an_aborted_answer_by_token_ids_is_asked_of_another_replica(fields: dict[str, Any]):
    async with Aborting(label="1") as bad, TokenServer(label="1") as good:
        gateway = behind(BackendSettings(url=bad.url), BackendSettings(url=good.url))
        async with gateway as url:
            assert (await asked_by_tokens(url, rollout_of(bad, good), BODY | fields))[0] == 200
        assert [server.log.count(GENERATE) for server in (bad, good)] == [1, 1]
        assert "/v1/chat/completions" not in bad.log + good.log
    (span,) = gateway.publisher.spans
    assert (span.status, span.endpoint, span.response_token_ids) == ("ok", good.url, [5, 6])


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}, {"stream": True}])
async def test_an_answer_by_token_ids_that_every_try_aborts_is_recorded_with_its_tokens(fields: dict[str, Any]):
    async with Aborting(label="1") as server:
        gateway = behind(BackendSettings(url=server.url))
        async with gateway as url:
            _, body = await asked_by_tokens(url, "r1", BODY | fields)
        assert b"backend_broken" in body
        assert server.log.count(GENERATE) == MAX_BROKEN_TRIES
        assert "/v1/chat/completions" not in server.log
    (span,) = gateway.publisher.spans
    assert (span.status, span.finish_reason) == ("error", "")
    assert (span.prompt_token_ids, span.response_token_ids, span.logprobs) == ([1, 2], [5, 6], [-1.0, -1.0])
    assert [version.version for version in span.weight_versions] == [1]
    if "tools" not in fields:
        assert json.loads(span.output)["content"] == "y"


async def test_a_pause_that_keeps_its_requests_costs_no_answer():
    """What the follower does for every version."""
    async with FakePolicyServer(weights=7, label="1", paused=True) as server:
        gateway = behind(BackendSettings(url=server.url))
        async with gateway as url:
            call = asyncio.create_task(asked(url))
            await until(lambda: server.requests)
            server.paused = False
            assert (await call)[0] == 200
        assert server.log.count("/v1/chat/completions") == 1


def test_abort_is_no_end_of_an_answer():
    assert "abort" not in ENDS

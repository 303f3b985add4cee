"""Replicas of which one does not have the routes of token ids: the rollouts of the others go on exactly."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from itertools import count
from typing import Any

import aiohttp
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.places import score
from fulgurite.schemas.settings import BackendSettings
from tests.producers.gateway_support import MESSAGES
from tests.producers.test_gateway_failures import behind
from tests.producers.test_gateway_hostile import TOOLS, TokenServer

BODY: dict[str, Any] = {"model": "policy", "messages": MESSAGES}
GENERATE = "/inference/v1/generate"
CHAT = "/v1/chat/completions"


def rollout_of(server: TokenServer, other: TokenServer) -> str:
    """One that is pinned to the first."""
    rollouts = (f"r{number}" for number in count())
    return next(rollout for rollout in rollouts if score(rollout, server.url) > score(rollout, other.url))


async def asked(url: str, rollout: str, body: dict[str, Any]) -> tuple[int, bytes]:
    path = f"{url}/rollout/{rollout}/attempt/a1{CHAT}"
    async with aiohttp.ClientSession() as session, session.post(path, json=body) as answer:
        return answer.status, await answer.read()


async def post(url: str, rollout: str, body: dict[str, Any]) -> int:
    return (await asked(url, rollout, body))[0]


@pytest.mark.parametrize(
    ("missing", "fields", "asked_in_vain"),
    [
        ("render", {}, f"{CHAT}/render"),
        ("generate", {"stream": True}, GENERATE),
        ("derender", {"tools": TOOLS}, f"{CHAT}/derender"),
    ],
)
async def test_a_replica_without_the_token_routes_turns_them_off_for_itself_alone(
    missing: str, fields: dict[str, Any], asked_in_vain: str
):
    async with TokenServer(label="1") as older, TokenServer(label="1") as good:
        older.missing = frozenset({missing})
        replicas = behind(BackendSettings(url=older.url), BackendSettings(url=good.url))
        async with replicas as url:
            for _ in range(2):
                assert await post(url, rollout_of(good, older), BODY | fields | {"stream": False}) == 200
                assert await post(url, rollout_of(older, good), BODY | fields) == 200
        assert (good.log.count(GENERATE), good.log.count(CHAT)) == (2, 0)
        assert (older.log.count(asked_in_vain), older.log.count(CHAT)) == (1, 2)
        assert [span.status for span in replicas.publisher.spans] == ["ok"] * 4


async def test_a_rollout_whose_replica_is_away_goes_on_exactly_on_another():
    async with TokenServer(label="1") as older, TokenServer(label="1") as good:
        older.missing = frozenset({"render"})
        replicas = behind(BackendSettings(url=older.url), BackendSettings(url=good.url))
        async with replicas as url:
            rollout = rollout_of(older, good)
            assert await post(url, rollout, BODY) == 200
            assert replicas.pool.preferred("policy", rollout) == older.url
            for member in replicas.pool._members.all:  # pyright: ignore[reportPrivateUsage]
                member.capacity.well = member.url != older.url
            assert replicas.pool.preferred("policy", rollout) == good.url
            assert await post(url, rollout, BODY) == 200
        assert (older.log.count(CHAT), good.log.count(GENERATE)) == (1, 1)
        assert replicas.pool.preferred("nobody", rollout) == ""


class Wordless(TokenServer):
    """Passes over `output_mode`: tokens alone, whole or streamed."""

    stopped_by: str = ""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        found = super().more_routes()
        (generate,) = (handler for route, _, handler in found if route == GENERATE)

        async def tokens(request: Request) -> Response:
            answer = orjson.loads((await generate(request)).body)
            for choice in answer["choices"]:
                del choice["text"]
                if self.stopped_by:
                    choice["stop_reason"] = self.stopped_by
            if not (await request.json()).get("stream"):
                return JSONResponse(answer)
            return Response(b"data: " + orjson.dumps(answer) + b"\n\n", media_type="text/event-stream")

        return [(GENERATE, "POST", tokens), *(route for route in found if route[0] != GENERATE)]


async def test_tokens_without_text_are_put_into_words():
    async with Wordless(label="1") as server:
        replicas = behind(BackendSettings(url=server.url))
        async with replicas as url:
            status, answer = await asked(url, "r1", BODY)
        (choice,) = orjson.loads(answer)["choices"]
        assert (status, choice["message"]["content"]) == (200, "y")
        assert CHAT not in server.log
    (span,) = replicas.publisher.spans
    assert (span.status, span.response_token_ids) == ("ok", [5, 6])


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({}, "one<stop>two"),
        ({"tools": TOOLS, "tool_choice": "none"}, "one<stop>two"),
        ({"stop": ["<stop>"]}, "one"),
        ({"logprobs": True}, "one<stop>two"),
    ],
)
async def test_tokens_without_text_that_nobody_puts_into_words_are_spelled_out(fields: dict[str, Any], content: str):
    async with Wordless(label="1") as server:
        server.missing = frozenset({"derender"})
        server.faults["/detokenize"] = lambda: JSONResponse({"prompt": "one<stop>two"})
        if "stop" in fields:
            server.stopped_by = "<stop>"
        replicas = behind(BackendSettings(url=server.url))
        async with replicas as url:
            found = await asyncio.gather(*(asked(url, f"r{number}", BODY | fields) for number in range(4)))
            assert [status for status, _ in found] == [200] * 4
            for _, answer in found:
                (choice,) = orjson.loads(answer)["choices"]
                assert choice["message"]["content"] == content
                assert len((choice.get("logprobs") or {}).get("content") or ()) == 2 * ("logprobs" in fields)
            status, answer = await asked(url, "r0", BODY | fields)
            assert status == 200
        assert (server.log.count(GENERATE), server.log.count(CHAT)) == (4, 1)
    assert [span.status for span in replicas.publisher.spans] == ["ok"] * 5
    assert [span.response_token_ids for span in replicas.publisher.spans][:4] == [[5, 6]] * 4
    assert not replicas.publisher.dead


async def test_tokens_that_cannot_be_spelled_out_are_recorded_with_the_error():
    async with Wordless(label="1") as server:
        server.missing = frozenset({"derender"})
        replicas = behind(BackendSettings(url=server.url))
        async with replicas as url:
            server.faults["/detokenize"] = lambda: JSONResponse({}, 404) if GENERATE in server.log else None
            assert await post(url, "r1", BODY) == 502
    (span,) = replicas.publisher.spans
    assert (span.status, span.output_tokens) == ("error", 2), "it cost its tokens"


async def test_a_stream_of_tokens_without_text_is_asked_of_the_chat_route():
    async with Wordless(label="1") as server:
        replicas = behind(BackendSettings(url=server.url))
        async with replicas as url:
            for _ in range(2):
                status, answer = await asked(url, "r1", BODY | {"stream": True})
                assert (status, b"[DONE]" in answer, b"error" in answer) == (200, True, False)
        assert (server.log.count(GENERATE), server.log.count(CHAT)) == (1, 2)
    assert [span.status for span in replicas.publisher.spans] == ["ok"] * 2
    assert not replicas.publisher.dead


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"tools": TOOLS}])
@pytest.mark.parametrize(
    "rendered",
    [
        b'[[], [{"prompt_token_ids": [1, 2]}]]',  # as vLLM did in early 2026
        b"<html>",
        b"",
    ],
)
async def test_a_server_that_renders_in_another_shape_is_asked_by_text(rendered: bytes, fields: dict[str, Any]):
    async with TokenServer(label="1") as server:
        server.faults[f"{CHAT}/render"] = lambda: Response(rendered)
        replicas = behind(BackendSettings(url=server.url))
        async with replicas as url:
            for _ in range(2):
                assert await post(url, "r1", BODY | fields) == 200
        assert (server.log.count(GENERATE), server.log.count(CHAT)) == (0, 2)
    assert [span.status for span in replicas.publisher.spans] == ["ok"] * 2
    assert not replicas.publisher.dead


class Streaming(TokenServer):
    """GENERATE streams where it is asked to."""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        found = super().more_routes()
        (generate,) = (handler for route, _, handler in found if route == GENERATE)

        async def events(request: Request) -> Response:
            answer = await generate(request)
            if not (await request.json()).get("stream"):
                return answer
            return Response(b"data: " + answer.body + b"\n\ndata: [DONE]\n\n", media_type="text/event-stream")

        return [(GENERATE, "POST", events), *(route for route in found if route[0] != GENERATE)]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}, {"stream": True}])
@pytest.mark.parametrize("own", [{}, {"request_id": None}])
async def test_an_answer_without_an_id_of_the_servers_has_one_of_ours(own: dict[str, Any], fields: dict[str, Any]):
    async with Streaming(label="1") as server:
        rendered = {"token_ids": [1, 2], "sampling_params": {}, "model": "policy"} | own
        server.faults[f"{CHAT}/render"] = lambda: JSONResponse(rendered)
        replicas = behind(BackendSettings(url=server.url))
        async with replicas as url:
            found = [await asked(url, "r1", BODY | fields) for _ in range(2)]
        assert [status for status, _ in found] == [200] * 2
        assert (server.log.count(GENERATE), server.log.count(CHAT)) == (2, 0)
    ids = [set(re.findall(rb'"id": ?"(chatcmpl-[0-9a-f]{32})"', answer)) for _, answer in found]
    assert [len(each) for each in ids] == [1, 1], "one in all events"
    assert ids[0] != ids[1]
    assert [span.status for span in replicas.publisher.spans] == ["ok"] * 2

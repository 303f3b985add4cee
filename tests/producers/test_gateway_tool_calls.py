"""Tool calls by token ids: an agent gets what the chat route would have given it, ids included."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.token_route import DERENDER, GENERATE
from tests.producers.gateway_support import MESSAGES, FakePublisher, gateway
from tests.producers.test_gateway_hostile import TOOLS, TokenServer, post

BODY: dict[str, Any] = {"model": "policy", "messages": MESSAGES, "tools": TOOLS}


def tool_call(name: str, given_id: str) -> dict[str, Any]:
    return {"id": given_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


@dataclass
class ToolServer(TokenServer):
    """Its answers call tools; DERENDER makes up their ids, but as a stream gives the parser's, as vLLM does."""

    calls: tuple[str, ...] = ("add",)
    parser_ids: Callable[[int], str] | None = None
    """Of the nth call; None: as a stream its parser finds no calls."""
    ended: dict[str, Any] = field(default_factory=dict[str, Any])
    """How, where not by itself."""
    pieces: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What was derendered as a stream."""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        others = [route for route in super().more_routes() if route[0] not in (GENERATE, DERENDER)]
        return [*others, (GENERATE, "POST", self._generate), (DERENDER, "POST", self._derender)]

    async def _generate(self, request: Request) -> Response:
        content = [{"token_id": one, "logprob": -1.0, "top_logprobs": []} for one in (5, 6)]
        choice: dict[str, Any] = {"index": 0, "token_ids": [5, 6], "logprobs": {"content": content}}
        choice["weight_versions"] = [{"version": "1", "start": 0, "end": 2}]
        usage = {"prompt_tokens": 2, "completion_tokens": 2}
        return JSONResponse({"choices": [choice | {"finish_reason": "stop"} | self.ended], "usage": usage})

    async def _derender(self, request: Request) -> Response:
        asked = await request.json()
        if asked.get("stream"):
            self.pieces.append(asked)
            found = enumerate(self.calls if self.parser_ids else ())
            deltas = [tool_call(name, self.parser_ids(at)) | {"index": at} for at, name in found if self.parser_ids]
            delta = {"role": "assistant", "tool_calls": deltas}
            return JSONResponse({"chunk": {"choices": [{"index": 0, "delta": delta}]}, "stream_state": {}})
        calls = [tool_call(name, f"{at:016x}") for at, name in enumerate(self.calls)]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        return JSONResponse({"choices": [{"index": 0, "message": message}]})


async def asked(url: str, **more: Any) -> dict[str, Any]:
    """The one choice of an answer."""
    status, answer = await post(url, "/v1/chat/completions", BODY | more)
    assert status == 200, answer
    (choice,) = orjson.loads(answer)["choices"]
    return choice


def ids_of(choice: dict[str, Any]) -> list[str]:
    return [call["id"] for call in choice["message"]["tool_calls"]]


async def test_the_ids_of_tool_calls_are_those_of_the_models_parser():
    """Kimi writes them into its answer, and its template into the next prompt."""
    publisher = FakePublisher()
    server = ToolServer(label="1", calls=("add", "add"), parser_ids="functions.add:{}".format)
    async with server as backend, gateway(publisher, backend.url) as url:
        for _ in range(2):
            assert ids_of(await asked(url)) == ["functions.add:0", "functions.add:1"]
    assert [call["id"] for call in orjson.loads(publisher.spans[0].output)["tool_calls"]] == [
        "functions.add:0",
        "functions.add:1",
    ]
    piece = server.pieces[0]
    assert (piece["prompt_token_ids"], piece["chat_request"]["tools"]) == ([1, 2], TOOLS)
    assert [choice["token_ids"] for choice in piece["generate_chunk"]["choices"]] == [
        [5]
    ]  # without the end of the turn
    assert piece["generate_chunk"]["choices"][0]["finish_reason"] == "stop"
    assert len(server.pieces) == 3, "twice for the first answer: they are not made at random"


@pytest.mark.parametrize(
    ("forms", "made_like", "pieces"),
    [
        (["chatcmpl-tool-0a", "chatcmpl-tool-0b"], r"chatcmpl-tool-[0-9a-f]{16}", 1),
        (["E7Mj5MqbS", "G2XT9uf16"], r"[A-Za-z0-9]{9}", 2),
        (["call_0_0a", "call_0_0b"], r"[A-Za-z0-9]{9}", 2),
    ],
)
async def test_ids_that_a_parser_makes_at_random_are_asked_for_no_more(forms: list[str], made_like: str, pieces: int):
    given = iter(forms)
    server = ToolServer(label="1", parser_ids=lambda _: next(given))
    async with server as backend, gateway(FakePublisher(), backend.url) as url:
        assert ids_of(await asked(url)) == forms[:1]
        made = [ids_of(await asked(url))[0] for _ in range(3)]
    assert all(re.fullmatch(made_like, one) for one in made)
    assert len(set(made)) == 3
    assert len(server.pieces) == pieces


@pytest.mark.parametrize("parser_ids", [None, "a refusal"])
async def test_ids_that_are_not_found_out_are_such_that_no_template_refuses_them(parser_ids: Any):
    """Mistral's want nine letters and digits."""
    server = ToolServer(label="1", calls=("add", "add"))
    seen: list[int] = []
    if parser_ids:
        refused = JSONResponse({"error": {"message": "no"}}, status_code=400)
        server.faults[DERENDER] = lambda: refused if seen.append(1) or len(seen) % 3 == 0 else None
    async with server as backend, gateway(FakePublisher(), backend.url) as url:
        ids = ids_of(await asked(url))
        before = len(server.pieces), len(seen)
        await asked(url)
    assert len(set(ids)) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", one) for one in ids)
    assert (len(server.pieces), len(seen)) == (before[0], before[1] + bool(seen)), "it is not asked again for a while"


async def test_a_token_the_agent_asked_to_stop_at_is_kept_from_the_parser_and_written_for_its_logprob():
    server = ToolServer(label="1", ended={"stop_reason": 6})
    async with server as backend, gateway(FakePublisher(), backend.url) as url:
        choice = await asked(url, stop_token_ids=[6], logprobs=True)
    assert choice["logprobs"]["content"][-1]["token"] == "<end>"
    assert server.pieces[0]["generate_chunk"]["choices"][0]["token_ids"] == [5]

"""The metric of how prompts go on: of every call, what was really asked, by whichever route."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.pool import Pool
from fulgurite.producers.gateway.protocols import BY_ROUTE
from fulgurite.producers.gateway.turns import has_turn
from fulgurite.schemas.settings import BackendSettings, GatewaySettings
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import FakePublisher, serving, well

ROLES = {"system": 256, "user": 257, "assistant": 258, "tool": 259}
END, ANSWER = 300, 1000
"""ANSWER is one token for what the template would write as two."""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CHAT, MESSAGES, RESPONSES, COMPLETIONS = "/chat/completions", "/messages", "/responses", "/completions"


@dataclass
class Template(FakePolicyServer):
    """Renders bytes between roles, answers `ab`; a server with a parser of reasoning says so."""

    label: str | None = "1"
    reasoning: dict[str, Any] | None = None
    refuses: bool = False
    """Prompts by their tokens."""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        return [
            ("/v1/chat/completions/render", "POST", self._render),
            ("/inference/v1/generate", "POST", self._generate),
            ("/v1/chat/completions/derender", "POST", self._derender),
            ("/detokenize", "POST", self._detokenize),
        ]

    async def _render(self, request: Request) -> Response:
        asked = await request.json()
        ids: list[int] = []
        for message in asked["messages"]:
            ids += [ROLES[message["role"]], *(message.get("content") or "").encode(), END]
        ids += [ROLES["assistant"]] if asked.get("add_generation_prompt", True) else []
        rendered = {"request_id": "x", "token_ids": ids, "sampling_params": {"max_tokens": 5}, "model": "policy"}
        return JSONResponse(rendered | {"reasoning_parser_kwargs": self.reasoning})

    async def _generate(self, request: Request) -> Response:
        asked = await request.json()
        if self.refuses:
            return JSONResponse({"error": {"message": "no"}}, 400)
        entry = {"token": "ab", "token_id": ANSWER, "logprob": -0.5, "bytes": [], "top_logprobs": []}
        choice = {
            "index": 0,
            "token_ids": [ANSWER, END],
            "text": "ab",
            "logprobs": {"content": [entry, entry | {"token_id": END}]},
            "finish_reason": "stop",
            "weight_versions": [{"version": "1", "start": 0, "end": 2}],
        }
        usage = {"prompt_tokens": len(asked["token_ids"]), "completion_tokens": 2}
        if not asked.get("stream"):
            return JSONResponse({"choices": [choice], "usage": usage})
        events = [json.dumps({"choices": [choice]}), json.dumps({"choices": [], "usage": usage}), "[DONE]"]
        return Response("".join(f"data: {event}\n\n" for event in events), media_type="text/event-stream")

    async def _derender(self, request: Request) -> Response:
        return JSONResponse({"choices": [{"index": 0, "message": {"role": "assistant", "content": "ab"}}]})

    async def _detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": {END: "<|end|>"}.get((await request.json())["tokens"][0], "x")})


async def turns(server: Template, *asked: dict[str, Any], route: str = CHAT, **settings: Any) -> dict[str, float]:
    """What the metric says of these calls of a rollout; each goes on with the answer to the one before."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server)
        given: Any = {"backends": [BackendSettings(url=server.url)]} | settings
        pool = await stack.enter_async_context(Pool(GatewaySettings(**given)))
        url = await stack.enter_async_context(serving(Gateway(GatewaySettings(**given), pool, FakePublisher(), well)))
        agent = await stack.enter_async_context(httpx.AsyncClient())
        messages: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
        counted: dict[str, float] = {}
        for number, fields in enumerate(asked):
            body = {
                "model": "policy",
                "max_tokens": 9,
                "input" if route == RESPONSES else "messages": messages,
            } | fields
            answer = await agent.post(f"{url}/rollout/r/attempt/a/v1{route}", json=body)
            assert answer.status_code == 200
            await until(lambda: sum(_counted(pool).values()) == number + 1)  # noqa: B023
            counted = _counted(pool)
            messages += [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "more"}]
        return counted


def _counted(pool: Pool) -> dict[str, float]:
    samples = [sample for metric in pool.metrics.registry.collect() for sample in metric.samples]
    return {each.labels["turn"]: each.value for each in samples if each.name == "fulgurite_gateway_prompts_total"}


WHOLE: dict[str, Any] = {}
STREAM: dict[str, Any] = {"stream": True}


@pytest.mark.parametrize(
    ("reasoning", "asked", "expected"),
    [
        (None, [WHOLE, WHOLE, WHOLE], {"begins": 1, "continues": 2}),
        (None, [STREAM, STREAM, STREAM], {"begins": 1, "continues": 2}),
        (None, [WHOLE | {"tools": TOOLS}] * 3, {"begins": 1, "continues": 2}),
        (None, [STREAM | {"tools": TOOLS}] * 3, {"begins": 1, "by_text": 2}),
        ({}, [WHOLE, WHOLE, WHOLE], {"begins": 1, "continues": 2}),
        ({}, [STREAM, STREAM, STREAM], {"begins": 1, "by_text": 2}),
        ({}, [WHOLE, STREAM, STREAM], {"begins": 1, "by_text": 2}),
    ],
)
async def test_a_call_counts_as_what_it_was_asked_with(
    reasoning: dict[str, Any] | None, asked: list[dict[str, Any]], expected: dict[str, float]
):
    assert await turns(Template(reasoning=reasoning), *asked) == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_by_tokens_that_was_refused_counts_as_text(stream: bool):
    fields = {"stream": stream}
    assert await turns(Template(refuses=True), fields, fields) == {"begins": 1, "by_text": 1}


@pytest.mark.parametrize("route", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
async def test_other_protocols_go_on_by_text(route: str, stream: bool):
    fields = {"stream": stream}
    assert await turns(Template(), fields, fields, route=route) == {"begins": 1, "by_text": 1}


async def test_a_gateway_that_keeps_no_tokens_says_so():
    assert await turns(Template(), WHOLE, WHOLE, exact_prompts=False) == {"begins": 1, "by_text": 1}


@pytest.mark.parametrize(
    ("route", "body", "expected"),
    [
        (CHAT, {"messages": [{"role": "user"}]}, False),
        (CHAT, {"messages": [{"role": "user"}, {"role": "assistant"}]}, True),
        (CHAT, {"messages": "no"}, False),
        (MESSAGES, {"messages": [{"role": "assistant"}, 5]}, True),
        (RESPONSES, {"input": "text"}, False),
        (RESPONSES, {"input": "text", "previous_response_id": "r"}, True),
        (RESPONSES, {"input": [{"type": "function_call"}, {"type": "function_call_output"}]}, True),
        (RESPONSES, {"input": [{"type": "reasoning"}]}, True),
        (RESPONSES, {"input": [{"role": "user"}]}, False),
        (COMPLETIONS, {"prompt": "text"}, None),
    ],
)
def test_which_requests_have_an_earlier_answer(route: str, body: dict[str, Any], expected: bool | None):
    assert has_turn(BY_ROUTE[f"/v1{route}"], body) is expected

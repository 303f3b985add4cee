"""A conversation of several turns by token ids: every prompt begins with exactly what was sampled before, and the agent
gets what the chat route would have given it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from fulgurite.producers.gateway.asking import Asked
from fulgurite.producers.gateway.calls import Call, Caller
from fulgurite.producers.gateway.continuation import splice, tokens
from fulgurite.producers.gateway.conversations import Conversations
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import (
    DERENDER,
    GENERATE,
    RENDER,
    chat_completion,
    derender_request,
    ends_turn,
    generate_request,
    is_plain,
)
from fulgurite.producers.gateway.tool_call_ids import ToolCallIds
from fulgurite.producers.gateway.turn_ends import TEXT, TurnEnds
from fulgurite.schemas.event import VersionSpan
from tests.vllm.server import VllmServer
from tests.vllm.tiny_model import END, Oracle, worst_error
from tests.vllm.world import TOLERANCE, World

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ATTEMPT = ("r1", "a1", "policy")
END_ID = 1
FOR_EVER = float("inf")
TOOL: Any = {
    "type": "function",
    "function": {"name": "calculate", "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2]}}}},
}


class Asker(TokenAsker):
    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def ask(
        self,
        call: Call,
        route: str,
        body: Mapping[str, Any],
        deadline: float,
        asked: Asked | None = None,
        *,
        whole_deadline: float = 0.0,
        without: frozenset[str] = frozenset(),
    ) -> dict[str, Any] | None:
        response = await self.client.post(route, json=body)
        assert response.status_code in (200, 400), response.text
        return response.json() if response.status_code == 200 else None


@dataclass
class Gateway:
    """The recipe of token_route.py, with nothing around it."""

    client: httpx.AsyncClient
    conversations: Conversations = field(default_factory=Conversations)
    rendered: list[list[int]] = field(default_factory=list[list[int]])

    def __post_init__(self) -> None:
        self.ends = TurnEnds(Asker(self.client))
        self.call_ids = ToolCallIds(Asker(self.client))

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        rendered = await self.post(RENDER, body)
        prompt: list[int] = rendered["token_ids"]
        self.rendered.append(prompt)
        found = self.conversations.find(ATTEMPT, body["messages"])
        caller = Caller(rollout_id="r1", attempt_id="a1", authorization="", key="", headers={}, query="")
        call = Call(CHAT, caller, (1,), "1" * 32, "", ("1" * 16,), "", 0, 1, 0.0, body, b"", b"")
        await self.ends.closing(call, TEXT, FOR_EVER)
        spliced = None
        if found:
            form, end = found.form, found.turn.end
            closing = await self.ends.closing(call, form, FOR_EVER, follows=found.follows, sampled=end)
            assert closing
            assert (closing.token, closing.own) == (END_ID, True)
            spliced = splice(found.turn, tokens(prompt), closing)
            prompt = spliced.prompt.tolist()
        generated = await self.post(GENERATE, generate_request(body, rendered, prompt))
        asked = None if is_plain(body, rendered) else derender_request(body, generated, prompt)
        derendered = await self.post(DERENDER, asked) if asked else None
        if asked and derendered:
            await self.call_ids.put_in(call, asked, derendered, FOR_EVER)
        answer = chat_completion(body, rendered, prompt, generated, derendered, {END_ID: END})
        for choice in answer["choices"]:
            self.conversations.remember(
                ATTEMPT,
                body["messages"],
                choice["message"],
                rendered=rendered["token_ids"],
                prompt=prompt,
                response=choice["token_ids"],
                end_text=END if ends_turn(body, choice) else None,
                ends=self.ends.known("policy"),
                answers=spliced.answers if spliced else (),
            )
        return answer

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.mark.parametrize("tools", [False, True])
async def test_every_prompt_begins_with_what_was_sampled_before(world: World, oracles: dict[int, Oracle], tools: bool):
    messages: list[dict[str, Any]] = [{"role": "user", "content": "why not?"}]
    before: list[int] = []
    drifted = 0
    async with httpx.AsyncClient(base_url=world.vllm.url, timeout=120) as client:
        gateway = Gateway(client)
        for number in range(5):
            body: dict[str, Any] = {"model": "policy", "messages": messages, "max_tokens": 1_000 if number == 0 else 40}
            if tools:
                body |= {"tools": [TOOL], "tool_choice": "required" if number % 2 else "auto"}
            if number == 0:
                body["logit_bias"] = {str(END_ID): 6.0}  # it ends by itself, soon
            answer = await gateway.complete(body)
            (choice,) = answer["choices"]
            prompt, response = answer["prompt_token_ids"], choice["token_ids"]
            assert prompt[: len(before)] == before
            drifted += gateway.rendered[-1][: len(before)] != before
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            versions = [VersionSpan(version=1, start=0, end=len(response))]
            assert [int(part["version"]) for part in choice["weight_versions"]] == [1]
            if number and not tools:  # a bias and a grammar change what is sampled from
                assert worst_error(oracles, prompt, response, logprobs, versions) < TOLERANCE
            assert END not in (choice["message"]["content"] or "")
            before = [*prompt, *response]
            messages = [*messages, choice["message"], {"role": "tool", "content": f"{number}", "tool_call_id": "1"}]
    assert drifted >= 3, "the naive way would have done: nothing is shown"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2, "top_logprobs": 2, "temperature": 1, "top_k": 1},
        {"stop": ["e"], "max_tokens": 500},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300},
        {"tools": [TOOL], "stop": ["e"], "max_tokens": 500},
        {"max_tokens": 1_500},
        {"max_tokens": 16, "ignore_eos": True},  # vLLM's own default, which rendering leaves out
        {"max_tokens": None, "min_tokens": 20},
        {"tools": [TOOL], "max_tokens": 1_500},
    ],
)
async def test_the_answer_is_what_the_chat_route_gives(vllm: VllmServer, more: dict[str, Any]):
    """Greedy, so both say the same."""
    body: dict[str, Any] = {
        "model": "policy",
        "messages": [{"role": "user", "content": "now and then"}],
        "temperature": 0,
        "max_tokens": 50,
        "logprobs": True,
        "return_token_ids": True,
        "logit_bias": {str(END_ID): 3.5},
    } | more
    async with httpx.AsyncClient(base_url=vllm.url, timeout=120) as client:
        gateway = Gateway(client)
        chat = await gateway.post("/v1/chat/completions", body)
        ours = await gateway.complete(body)
    assert ours["prompt_token_ids"] == chat["prompt_token_ids"]
    assert ours["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"]
    for mine, theirs in zip(ours["choices"], chat["choices"], strict=True):
        assert mine["token_ids"] == theirs["token_ids"]
        assert mine["finish_reason"] == theirs["finish_reason"]
        assert mine["stop_reason"] == theirs["stop_reason"]
        assert (mine["message"]["content"] or "").rstrip("�") == (theirs["message"]["content"] or "").rstrip("�")
        assert calls_of(mine) == calls_of(theirs)
        assert written(mine) == written(theirs)


def calls_of(choice: dict[str, Any]) -> list[Any]:
    """Of their ids the form: they are made at random."""
    calls = choice["message"].get("tool_calls") or ()
    return [(re.sub("[0-9a-f]", "0", call["id"]), call["function"]) for call in calls]


def written(choice: dict[str, Any]) -> list[Any]:
    return [
        (token["token"], round(token["logprob"], 3), [top["token"] for top in token["top_logprobs"]])
        for token in choice["logprobs"]["content"]
    ]

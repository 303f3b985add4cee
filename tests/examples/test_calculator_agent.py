"""The agent against a scripted server on a real port: two turns, one, malformed ones, a busy server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.calculator.agent import agent
from examples.calculator.tasks import Task
from fulgurite.producers.rollout import RolloutContext

TASK: Task = {"question": "Ada has 7 pens and finds 3 more. How many now?", "answer": 10.0, "template": 0}


@dataclass
class FakeSpan:
    input: str
    output: str = ""


@dataclass
class FakeRollout:
    """The part of a RolloutContext that an agent uses."""

    base_url: str
    sampling_parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.5})
    traceparent: str = "00-1-2-01"
    tools: list[FakeSpan] = field(default_factory=list)

    @contextlib.contextmanager
    def tool(self, name: str, *, input: str) -> Generator[FakeSpan]:
        assert name == "calculator"
        span = FakeSpan(input)
        yield span
        self.tools.append(span)


@dataclass
class Script:
    url: str
    replies: list[str] = field(default_factory=list)
    refusals: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    traceparents: list[str | None] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        if self.refusals:
            self.refusals -= 1
            return JSONResponse({"error": {"message": "busy"}}, 503, {"Retry-After": "0.01"})
        self.requests.append(json.loads(await request.body()))
        self.traceparents.append(request.headers.get("traceparent"))
        message = {"role": "assistant", "content": self.replies[len(self.requests) - 1]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "policy", "choices": [choice]}
        )


@pytest.fixture
async def script() -> AsyncGenerator[Script]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    found = Script(f"http://127.0.0.1:{listener.getsockname()[1]}")
    app = Starlette(routes=[Route("/rollout/r/attempt/a/v1/chat/completions", found.answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    # pytest's own handlers stay.
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010
    running = asyncio.create_task(server.serve(sockets=[listener]))
    yield found
    server.should_exit = True
    await running


async def run(script: Script, *replies: str) -> tuple[float, FakeRollout]:
    script.replies = list(replies)
    rollout = FakeRollout(base_url=f"{script.url}/rollout/r/attempt/a/v1")
    reward = await agent(TASK, cast(RolloutContext, rollout))
    return reward, rollout


async def test_two_turns_with_the_tool(script: Script) -> None:
    reward, rollout = await run(script, "CALC(7+3)", "ANS 10")
    assert reward == 1.0
    assert [(span.input, span.output) for span in rollout.tools] == [("7+3", "10")]
    first, second = script.requests
    assert first["temperature"] == 0.5
    assert second["messages"][:1] == first["messages"]
    assert [message["content"] for message in second["messages"]] == [TASK["question"], "CALC(7+3)", "10"]
    assert script.traceparents == ["00-1-2-01", "00-1-2-01"]


async def test_one_turn_without_it(script: Script) -> None:
    reward, rollout = await run(script, "ANS 10")
    assert (reward, rollout.tools, len(script.requests)) == (1.0, [], 1)


@pytest.mark.parametrize("replies", [("",), ("CALC(",), ("ANS ten",), ("CALC(7+)", "ANS 10x"), ("CALC()", "CALC(1)")])
async def test_malformed_answers_earn_nothing_and_raise_nothing(script: Script, replies: tuple[str, ...]) -> None:
    reward, _ = await run(script, *replies)
    assert reward == 0.0


async def test_a_busy_server_is_asked_again(script: Script) -> None:
    script.refusals = 3
    reward, _ = await run(script, "ANS 10")
    assert reward == 1.0

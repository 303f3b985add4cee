"""The real clients against the gateway, unchanged: whole and streamed answers, tools, failures. What they see, and that
what they did is recorded under their rollout."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest

from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import MESSAGES, FakePublisher, gateway

PATH = "/rollout/r1/attempt/a1"
TOKEN = "fg-r1/a1"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Served:
    """A gateway before a fake policy server, and what it recorded."""

    def __init__(self, url: str, publisher: FakePublisher, backend: FakePolicyServer) -> None:
        self.url = url
        self.publisher = publisher
        self.backend = backend

    def calls(self, count: int = 1, *, tokens: bool = True) -> None:
        """Exactly so many calls were recorded whole, under the rollout."""
        spans = self.publisher.spans
        assert [(span.rollout_id, span.attempt_id, span.status) for span in spans] == [("r1", "a1", "ok")] * count
        assert all(span.finish_reason for span in spans)
        assert not tokens or all(len(span.response_token_ids) == len(span.logprobs) == 5 for span in spans)
        assert not self.publisher.dead


@pytest.fixture
async def served() -> AsyncGenerator[Served]:
    publisher = FakePublisher()
    async with (
        FakePolicyServer(weights=7, label="1", reply_tokens=5) as backend,
        gateway(publisher, backend.url) as url,
    ):
        yield Served(url, publisher, backend)


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_sync_by_environment_alone(served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch):
    """An agent that can only be told OPENAI_BASE_URL and OPENAI_API_KEY is traceable."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)

    def agent() -> str:
        with openai.OpenAI() as client:
            if not stream:
                answer = client.chat.completions.create(model="policy", messages=MESSAGES)
                return answer.choices[0].message.content or ""
            chunks = client.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert await asyncio.to_thread(agent) == "answer 0"
    served.calls()


async def test_openai_async_with_tools_and_the_streaming_helper(served: Served):
    async with openai.AsyncOpenAI(base_url=f"{served.url}{PATH}/v1", api_key="none") as client:
        async with client.chat.completions.stream(
            model="policy", messages=MESSAGES, tools=[WEATHER], stream_options={"include_usage": True}
        ) as stream:
            async for _ in stream:
                pass
            answer = await stream.get_final_completion()
        (call,) = answer.choices[0].message.tool_calls or []
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bern"})
        assert answer.usage
        assert answer.usage.completion_tokens == 5
        messages: Any = [
            *MESSAGES,
            answer.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "sun"},
        ]
        last: Any = await client.chat.completions.create(model="policy", messages=messages, tools=[WEATHER])
    assert last.choices[0].message.content == "answer 0"
    served.calls(2)


async def test_openai_responses(served: Served):
    async with (
        openai.AsyncOpenAI(base_url=f"{served.url}{PATH}/v1", api_key="none") as client,
        client.responses.stream(model="policy", input="2+2?") as stream,
    ):
        async for _ in stream:
            pass
        answer = await stream.get_final_response()
    assert answer.output_text == "answer 0"
    served.calls()


async def test_openai_raises_its_own_errors(served: Served):
    async with openai.AsyncOpenAI(base_url=f"{served.url}{PATH}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="policy", messages=[])
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="policy", input="x", encoding_format="float")
        served.backend.cut_after = 3
        with pytest.raises(openai.APIError):
            async for _ in await client.chat.completions.create(model="policy", messages=MESSAGES, stream=True):
                pass


@pytest.mark.parametrize("by_token", [False, True])
async def test_anthropic(served: Served, by_token: bool):
    anthropic = pytest.importorskip("anthropic")
    base, key = (served.url, TOKEN) if by_token else (f"{served.url}{PATH}", "none")
    asked: Any = {"model": "policy", "max_tokens": 9, "messages": MESSAGES}
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}

    def sync() -> str:
        with anthropic.Anthropic(base_url=base, api_key=key) as client:
            return client.messages.create(**asked).content[0].text

    assert await asyncio.to_thread(sync) == "answer 0"
    async with anthropic.AsyncAnthropic(base_url=base, api_key=key, max_retries=0) as client:
        async with client.messages.stream(**asked) as stream:
            assert "".join([text async for text in stream.text_stream]) == "answer 0"
            assert (await stream.get_final_message()).stop_reason == "end_turn"
        async with client.messages.stream(**asked, tools=[tool]) as stream:
            used = (await stream.get_final_message()).content[0]
        assert (used.name, used.input) == ("weather", {"city": "Bern"})
        served.calls(3, tokens=False)
        with pytest.raises(anthropic.BadRequestError):
            await client.messages.create(**asked | {"messages": []})
        served.backend.cut_after = 4
        with pytest.raises(anthropic.APIStatusError):
            async with client.messages.stream(**asked) as stream:
                await stream.get_final_message()


async def test_langchain(served: Served):
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(model="policy", base_url=f"{served.url}{PATH}/v1", api_key="none")
    assert (await model.ainvoke("2+2?")).content == "answer 0"
    assert (await asyncio.to_thread(model.invoke, "2+2?")).content == "answer 0"
    assert "".join([chunk.content async for chunk in model.astream("2+2?")]) == "answer 0"
    called = await model.bind_tools([WEATHER]).ainvoke("weather?")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", {"city": "Bern"})]
    served.calls(4)


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_agents(served: Served, api: str, stream: bool):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    seen: list[str] = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        seen.append(city)
        return "sun"

    async with openai.AsyncOpenAI(base_url=f"{served.url}{PATH}/v1", api_key="none") as client:
        kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
        agent = agents.Agent(name="a", instructions="Be brief", model=kind("policy", client), tools=[weather])
        if stream:
            run = agents.Runner.run_streamed(agent, "2+2?")
            async for _ in run.stream_events():
                pass
        else:
            run = await agents.Runner.run(agent, "2+2?")
    assert (seen, run.final_output) == (["Bern"], "answer 0")
    served.calls(2, tokens=api == "chat")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("stream", [False, True])
async def test_curl(served: Served, stream: bool):
    body = json.dumps({"model": "policy", "messages": MESSAGES, "stream": stream})
    command = ["curl", "-sS", "-N", "--fail-with-body", "-H", "content-type: application/json"]
    command += ["-H", f"authorization: Bearer {TOKEN}", "-d", body, f"{served.url}/v1/chat/completions"]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    run = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    out, _ = await run.communicate()
    assert run.returncode == 0
    if stream:
        assert out.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(out)["choices"][0]["message"]["content"] == "answer 0"
    served.calls()

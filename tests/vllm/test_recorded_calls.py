"""What agents are answered through the gateway is on the log as vLLM sampled it: ids, versions, and logprobs that agree
with a plain forward of the served weights."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from transformers import PreTrainedTokenizerFast

from fulgurite.schemas.spans import Span
from tests.vllm.tiny_model import Oracle, make_tokenizer, worst_error
from tests.vllm.world import TOLERANCE, World, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MESSAGES: Any = [{"role": "user", "content": "why not, now and then: 0123456789"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def assert_sampled(oracles: dict[int, Oracle], span: Span, version: int) -> None:
    assert span.status == "ok", span.status_message
    assert [part.version for part in span.weight_versions] == [version]
    error = worst_error(oracles, span.prompt_token_ids, span.response_token_ids, span.logprobs, span.weight_versions)
    assert error < TOLERANCE


def text_of(span: Span, tokenizer: PreTrainedTokenizerFast) -> str:
    """Less what makes no character yet at its end: vLLM holds that back."""
    return str(tokenizer.decode(span.response_token_ids, skip_special_tokens=True)).rstrip("�")


async def test_calls_are_recorded_as_they_were_sampled(
    world: World, oracles: dict[int, Oracle], tokenizer: PreTrainedTokenizerFast
):
    async def ask(number: int) -> ChatCompletion:
        content = "said again: " * number * 12  # up to a thousand tokens: prefilled in chunks
        async with world.agent(f"r{number}") as agent:
            return await agent.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": content}], max_tokens=40 + 20 * number, n=2
            )

    answers = await asyncio.gather(*(ask(number) for number in range(1, 9)))
    spans = {(span.rollout_id, span.attributes["fulgurite.choice"]): span for span in await world.spans()}
    assert len(spans) == 16
    for number, answer in enumerate(answers, 1):
        for choice in answer.choices:
            span = spans[f"r{number}", choice.index]
            assert_sampled(oracles, span, 1)
            assert span.finish_reason == choice.finish_reason
            assert (choice.message.content or "").rstrip("�") == text_of(span, tokenizer)
            assert span.prompt_token_ids == tokenizer.encode(
                f"<|user|>{'said again: ' * number * 12}<|end|><|assistant|>"
            )
            assert choice.logprobs is None
            assert "token_ids" not in (choice.model_extra or {})
    assert await world.dead_letters() == 0


async def test_streamed_calls_are_recorded_as_they_were_sampled(
    world: World, oracles: dict[int, Oracle], tokenizer: PreTrainedTokenizerFast
):
    async def ask(number: int) -> tuple[dict[int, str], dict[int, str]]:
        said: dict[int, str] = {0: "", 1: ""}
        finished: dict[int, str] = {}
        async with world.agent(f"r{number}") as agent:
            chunks = await agent.chat.completions.create(
                model="policy", messages=MESSAGES, max_tokens=40 + 20 * number, n=2, stream=True
            )
            async for chunk in chunks:
                assert "prompt_token_ids" not in (chunk.model_extra or {})
                for choice in chunk.choices:
                    said[choice.index] += choice.delta.content or ""
                    if choice.finish_reason:
                        finished[choice.index] = choice.finish_reason
        return said, finished

    answers = await asyncio.gather(*(ask(number) for number in range(1, 9)))
    spans = {(span.rollout_id, span.attributes["fulgurite.choice"]): span for span in await world.spans()}
    assert len(spans) == 16
    for number, (said, finished) in enumerate(answers, 1):
        for index in (0, 1):
            span = spans[f"r{number}", index]
            assert_sampled(oracles, span, 1)
            assert span.finish_reason == finished[index]
            assert said[index].rstrip("�") == text_of(span, tokenizer)
    assert await world.dead_letters() == 0


async def test_completions_are_recorded_alike(world: World, oracles: dict[int, Oracle]):
    async with world.agent("r1") as agent:
        whole = await agent.completions.create(model="policy", prompt="why not,", max_tokens=50)
        parts = await agent.completions.create(model="policy", prompt="why not,", max_tokens=50, stream=True)
        text = "".join([choice.text async for chunk in parts for choice in chunk.choices])
    first, second = sorted(await world.spans(), key=lambda span: span.start_ns)
    assert whole.choices[0].text
    assert text
    for span in (first, second):
        assert span.operation == "text_completion"
        assert_sampled(oracles, span, 1)


async def test_tools_json_and_stop_strings_work_through_the_gateway(world: World, oracles: dict[int, Oracle]):
    tool: Any = {
        "type": "function",
        "function": {
            "name": "calculate",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    }
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    json_mode: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    async with world.agent("r1") as agent:
        make = agent.chat.completions.create
        forced: Any = {"type": "function", "function": {"name": "calculate"}}
        called = await make(model="policy", messages=MESSAGES, tools=[tool], tool_choice=forced, max_tokens=400)
        fixed = await make(model="policy", messages=MESSAGES, response_format=json_mode, max_tokens=400)
        stopped = await make(model="policy", messages=MESSAGES, stop=["e"], max_tokens=1_000)
    calls = called.choices[0].message.tool_calls
    assert calls is None or calls[0].function.name == "calculate"  # pyright: ignore[reportAttributeAccessIssue]
    assert "n" in (fixed.choices[0].message.content or "")
    text = stopped.choices[0].message.content
    assert text is not None  # empty where the first token stops it
    assert "e" not in text
    assert len(await world.spans()) == 3
    assert await world.dead_letters() == 0
    assert oracles


async def test_an_agent_that_hangs_up_ends_the_generation_and_leaves_a_span(world: World):
    async with world.agent("r1") as agent:
        chunks = await agent.chat.completions.create(
            model="policy", messages=MESSAGES, max_tokens=1_500, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in chunks:
            break
        assert await world.vllm.metric("vllm:num_requests_running") == 1
        await chunks.close()

    async def ended() -> list[Span]:
        return [] if await world.vllm.metric("vllm:num_requests_running") else await world.spans()

    (span,) = await until(ended, "it goes on generating, or leaves no span")
    assert span.status == "error"

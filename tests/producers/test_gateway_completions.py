"""Completions through the gateway: prompts of text and of token ids, lists of them, echoes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fulgurite.schemas.event import VersionSpan
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import FakePublisher, client, gateway
from tests.producers.test_gateway_protocols import BASE, posted
from tests.producers.test_gateway_streaming import data_of


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["2+2?", [5, 6]])
async def test_a_completion_is_recorded(prompt: Any, stream: bool):
    publisher = FakePublisher()
    async with (
        FakePolicyServer(weights=7, label="17") as backend,
        gateway(publisher, backend.url) as url,
        client(url) as agent,
    ):
        answer: Any = await agent.completions.create(model="policy", prompt=prompt, stream=stream)
        chunks = [chunk async for chunk in answer] if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "answer 0"
    assert all(chunk.choices[0].logprobs is None for chunk in chunks)
    assert all("token_ids" not in chunk.choices[0].model_dump() for chunk in chunks)
    (span,) = publisher.spans
    assert (span.operation, span.name, span.status) == ("text_completion", "text_completion policy", "ok")
    assert (span.prompt_token_ids, span.response_token_ids) == ([1, 2, 3, 4], [7, 7, 7])
    assert span.logprobs == [-0.125, -0.25, -0.375]
    assert span.weight_versions == [VersionSpan(version=17, start=0, end=3)]
    assert (span.input, span.output) == (prompt if isinstance(prompt, str) else "[5,6]", "answer 0")
    assert (span.finish_reason, span.input_tokens, span.output_tokens) == ("length", 4, 3)
    assert backend.requests[0]["logprobs"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_each_prompt_of_a_list_is_a_span_with_its_own_input(stream: bool):
    publisher = FakePublisher()
    asked = {"model": "policy", "prompt": ["one", "two"], "n": 2, "stream": stream, "echo": True, "logprobs": 1}
    async with (
        FakePolicyServer(weights=7, label="1") as backend,
        gateway(publisher, backend.url) as url,
        posted(url, f"{BASE}/v1/completions", asked) as response,
    ):
        assert response.status == 200
        await response.read()
    assert [span.input for span in publisher.spans] == ["one", "one", "two", "two"]
    assert all(span.logprobs == [-0.125, -0.25, -0.375] for span in publisher.spans), "without the echoed prompt's"
    assert not publisher.dead


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "has_ids"),
    [
        ({"prompt": ["one ", "two "], "n": 2}, True),
        ({"prompt": "one ", "max_tokens": 0, "logprobs": 1}, True),
        ({"prompt": [5, 6]}, False),
        ({"prompt": [[5], [6, 7]], "logprobs": 1}, False),
        ({"prompt": [5, 6], "return_token_ids": True}, True),
    ],
)
async def test_an_echo_is_what_the_backend_echoes_without_us(asked: Any, has_ids: bool, stream: bool):
    publisher = FakePublisher()
    asked = asked | {"model": "policy", "echo": True, "stream": stream}
    async with FakePolicyServer(weights=7, label="1") as backend, gateway(publisher, backend.url) as url:
        async with posted(url, f"{BASE}/v1/completions", asked) as response:
            through = await response.read()
        async with posted(backend.url, "/v1/completions", asked) as response:
            past = await response.read()
    if stream:
        assert [_told(chunk) for chunk in data_of(through)] == [_told(chunk) for chunk in data_of(past)]
    else:
        assert _told(json.loads(through)) == _told(json.loads(past))
    assert [(span.status, bool(span.prompt_token_ids)) for span in publisher.spans] == [("ok", has_ids)] * len(
        publisher.spans
    )
    assert not publisher.dead


def _told(answer: Any) -> Any:
    """Of an answer or a chunk what is not null: clients read both alike."""
    return [{name: value for name, value in choice.items() if value is not None} for choice in answer["choices"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_asked_back_alone_has_no_tokens_to_train_on(stream: bool):
    """vLLM samples a token then, and gives its id beside logprobs that are all of the prompt."""
    publisher = FakePublisher()
    asked = {"model": "policy", "prompt": "2+2?", "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
    async with (
        FakePolicyServer(weights=7, label="1") as backend,
        gateway(publisher, backend.url) as url,
        posted(url, f"{BASE}/v1/completions", asked) as response,
    ):
        body = await response.read()
    first = data_of(body)[0] if stream else json.loads(body)
    assert first["choices"][0]["logprobs"]["token_logprobs"] == [None, -9.0, -9.0, -9.0], "what the agent asked for"
    (span,) = publisher.spans
    assert (span.status, span.prompt_token_ids, span.response_token_ids) == ("ok", [1, 2, 3, 4], [])
    assert (span.logprobs, span.weight_versions, span.output_tokens) == ([], [], 0)
    assert not publisher.dead


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_an_echo_that_are_not_one_a_token_are_a_dead_letter(stream: bool):
    """As many as the answer has tokens may be the prompt's."""
    publisher = FakePublisher()
    asked = {"model": "policy", "prompt": "2+2?", "echo": True, "stream": stream}

    def mend(body: Any) -> Any:
        del body["choices"][0]["logprobs"]["token_logprobs"][3:]
        return body

    def mend_event(number: int, event: bytes) -> bytes:
        return event.replace(b"[null, -9.0, -9.0, -9.0, -0.125]", b"[null]")

    async with (
        FakePolicyServer(weights=7, label="1", mend=mend, mend_event=mend_event) as backend,
        gateway(publisher, backend.url) as url,
        posted(url, f"{BASE}/v1/completions", asked) as response,
    ):
        assert response.status == 200
        await response.read()
    assert [(span.status, span.response_token_ids) for span in publisher.spans] == [("error", [])]
    assert len(publisher.dead) == 1


@pytest.mark.parametrize("prompt", [None, "", [], {}, [[1]] * 2_000])
async def test_what_is_no_prompt_is_refused(prompt: Any):
    async with (
        FakePolicyServer() as backend,
        gateway(FakePublisher(), backend.url) as url,
        posted(url, f"{BASE}/v1/completions", {"model": "policy", "prompt": prompt}) as response,
    ):
        body = await response.json()
    if prompt == "":
        assert response.status == 200
    else:
        assert (response.status, body["error"]["param"]) == (400, "prompt")

"""Answers and streams that are not as they should be, and that an agent gets all the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.protocols import BY_ROUTE
from fulgurite.schemas.settings import BackendSettings
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import FakePublisher, gateway
from tests.producers.test_gateway_protocols import BASE, MESSAGE, answered
from tests.producers.test_gateway_streaming import raw


@pytest.mark.parametrize(
    ("route", "change", "told"),
    [
        ("chat/completions", {"choices": {"finish_reason": None}}, "finish reason is ''"),
        ("chat/completions", {"choices": {"finish_reason": "error"}}, "finish reason is 'error'"),
        ("chat/completions", {"error": {"message": "the engine died"}}, "the engine died"),
        ("completions", {"choices": {"finish_reason": "made_up"}}, "finish reason is 'made_up'"),
        ("responses", {"status": "failed"}, "'failed'"),
        ("responses", {"status": "queued"}, "'queued'"),
        ("responses", {"status": "incomplete", "incomplete_details": None}, "'incomplete'"),
    ],
)
async def test_an_answer_that_does_not_say_it_ended_is_given_and_recorded_as_an_error(
    route: str, change: Any, told: str
):
    publisher = FakePublisher()

    def mend(body: Any) -> Any:
        for choice in body.get("choices", ()):
            choice |= change.get("choices", {})
        return body | {name: value for name, value in change.items() if name != "choices"}

    asked: dict[str, Any] = {"model": "policy", "prompt": "2+2?", "input": "2+2?", "messages": MESSAGE["messages"]}
    async with FakePolicyServer(label="1", mend=mend) as backend, gateway(publisher, backend.url) as url:
        await answered(url, f"{BASE}/v1/{route}", asked)
    (span,) = publisher.spans
    assert (span.status, span.finish_reason, span.attributes["error.type"]) == ("error", "", "backend_error")
    assert told in span.status_message
    assert "answer 0" in span.output


@pytest.mark.parametrize(("reason", "status"), [("error", "error"), ("length", "ok")])
async def test_a_stream_that_ends_with_an_error_is_recorded_as_one(reason: str, status: str):
    publisher = FakePublisher()

    def mend(_: int, event: bytes) -> bytes:
        return event.replace(b'"finish_reason": "stop"', f'"finish_reason": "{reason}"'.encode())

    async with FakePolicyServer(label="1", mend_event=mend) as backend, gateway(publisher, backend.url) as url:
        await raw(url, f"{BASE}/v1/chat/completions")
    assert [span.status for span in publisher.spans] == [status]


HALVES = (b'{"content": "\\ud83d"}', b'{"content": "\\ude00"}')


@pytest.mark.parametrize(
    ("found", "given", "output"),
    [
        (b'{"content": "an"}', HALVES[0], "?swer 0"),
        (b'"index": 0', b'"index": null', "answer 0"),
        (b'"choices": [], "usage"', b'"choices": null, "usage"', "answer 0"),
        (b'"logprobs": null', b'"logprobs": {"content": [{"token": "x", "logprob": -Infinity}]}', "answer 0"),
    ],
)
async def test_a_providers_stream_that_its_clients_read_passes_and_is_recorded(found: bytes, given: bytes, output: str):
    """Halves of characters, numbers that are none, nulls in place of lists."""
    publisher = FakePublisher()

    def mend(_: int, event: bytes) -> bytes:
        return event.replace(found, given)

    options = {"include_usage": True}
    async with FakePolicyServer(mend_event=mend) as provider:
        backends = [BackendSettings(url=provider.url, kind="openai", models=["gpt"])]
        async with gateway(publisher, provider.url, backends=backends) as url:
            _, through = await raw(url, f"{BASE}/v1/chat/completions", model="gpt", stream_options=options)
        _, past = await raw(provider.url, "/v1/chat/completions", model="gpt", stream_options=options)
    assert through == past
    assert given in through
    (span,) = publisher.spans
    assert (span.status, span.finish_reason, span.input_tokens, span.output_tokens) == ("ok", "stop", 4, 3)
    assert json.loads(span.output)["content"] == output
    assert not publisher.dead


def test_a_character_that_comes_in_halves_is_whole_in_the_record():
    stream = BY_ROUTE["/v1/chat/completions"].stream({"messages": []}, strip=False)
    for half in HALVES:
        stream.feed(sse.Event(b"", b'{"choices": [{"index": 0, "delta": ' + half + b"}]}"))
    stream.close()
    assert stream.outcome.choices[0].output["content"] == "\U0001f600"

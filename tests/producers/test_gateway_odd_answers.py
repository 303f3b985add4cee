"""Answers and streams that are not as they should be, and that an agent gets all the same."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from aiohttp import web

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.protocols import BY_ROUTE
from fulgurite.schemas.settings import BackendSettings
from tests.producers.fake_backend import FakeBackend
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import FakePublisher, gateway
from tests.producers.test_gateway_failures import ANSWER, CALL, behind, streamed
from tests.producers.test_gateway_protocols import BASE, MESSAGE, answered, posted
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


TOLD = b'data: {"id": "x", "choices": [{"index": 0, %s, "finish_reason": %s}]}\n\n'
DELTA, TEXT = b'"delta": {"content": "answer"}', b'"text": "answer"'
DONE = b"data: [DONE]\n\n"
STARTED = (
    b'data: {"type": "message_start", "message": {"id": "m"}}\n\n'
    b'data: {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "answer"}}\n\n'
)
STOPPED = b'data: {"type": "message_stop"}\n\n'
BROKEN_OFF = "ended before its answer did"
NO_REASON = "its finish reason is ''"


@pytest.mark.parametrize(
    ("route", "kind", "events", "told"),
    [
        ("chat/completions", "openai", [TOLD % (DELTA, b"null"), DONE], NO_REASON),
        ("completions", "openai", [TOLD % (TEXT, b"null"), DONE], NO_REASON),
        ("messages", "openai", [STARTED, STOPPED], NO_REASON),
        ("chat/completions", "openai", [TOLD % (DELTA, b"null")], BROKEN_OFF),
        ("chat/completions", "openai", [DONE], BROKEN_OFF),
        ("messages", "openai", [STARTED], BROKEN_OFF),
        ("chat/completions", "vllm", [TOLD % (DELTA, b"null"), DONE], BROKEN_OFF),
        ("messages", "vllm", [STARTED, STOPPED], BROKEN_OFF),
    ],
)
async def test_a_provider_that_says_that_its_stream_is_over_is_believed(
    route: str, kind: Any, events: list[bytes], told: str
):
    """The policy's server says of each choice how it ended, or has failed."""
    async with FakeBackend(answer=streamed(*events)) as fake:
        behind_it = behind(fake.settings(kind=kind), exact_prompts=False, breaker_failures=1_000)
        async with behind_it as url:
            body = CALL | {"prompt": "2+2?", "max_tokens": 5, "stream": True}
            async with posted(url, f"{BASE}/v1/{route}", body) as response:
                passed = await response.read()
    whole = told == NO_REASON
    assert (passed == b"".join(events), b"backend_broken" in passed) == (whole, not whole)
    (span,) = behind_it.publisher.spans
    assert (span.status, span.finish_reason) == ("error", "")
    assert told in span.status_message
    assert ("answer" in span.output) == (events != [DONE])
    assert not behind_it.publisher.dead


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_does_not_know_n_shuts_nobody_out(stream: bool):
    events = [TOLD % (DELTA, b"null"), TOLD % (b'"delta": {}', b'"stop"'), DONE]

    async def whole(request: web.Request) -> web.StreamResponse:
        return web.json_response(ANSWER)

    async with FakeBackend(answer=streamed(*events) if stream else whole) as fake:
        behind_it = behind(fake.settings(kind="openai"), breaker_failures=2)
        async with behind_it as url:
            for _ in range(4):
                async with posted(url, f"{BASE}/v1/chat/completions", CALL | {"n": 2, "stream": stream}) as response:
                    assert response.status == 200
                    passed = await response.read()
                assert passed == b"".join(events) if stream else json.loads(passed) == ANSWER
            assert [state["breaker"] for state in behind_it.pool.state()] == ["closed"]
    spans = behind_it.publisher.spans
    assert [(span.status, span.finish_reason) for span in spans] == [("ok", "stop"), ("error", "")] * 4
    assert "no_choice" in spans[1].status_message
    assert not behind_it.publisher.dead


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_compresses_whatever_it_is_asked_is_read(stream: bool):
    events = b"".join([TOLD % (DELTA, b"null"), TOLD % (b'"delta": {}', b'"stop"'), DONE])

    async def answer(request: web.Request) -> web.StreamResponse:
        body = events if stream else json.dumps(ANSWER).encode()
        kind = "text/event-stream" if stream else "application/json"
        headers = {"content-encoding": "gzip", "content-type": kind}
        return web.Response(body=gzip.compress(body), headers=headers)

    async with FakeBackend(answer=answer) as fake:
        behind_it = behind(fake.settings(kind="openai"))
        asked = CALL | {"stream": stream}
        async with behind_it as url, posted(url, f"{BASE}/v1/chat/completions", asked) as response:
            passed = await response.read()
            assert "content-encoding" not in response.headers
    assert passed == events if stream else json.loads(passed) == ANSWER
    assert [(span.status, span.finish_reason) for span in behind_it.publisher.spans] == [("ok", "stop")]


async def test_a_compressed_answer_that_grows_beyond_the_bound_is_none():
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=gzip.compress(b" " * 30_000_000), headers={"content-encoding": "gzip"})

    async with FakeBackend(answer=answer) as fake:
        behind_it = behind(fake.settings(kind="openai"), max_answer_bytes=1_000_000)
        async with behind_it as url, posted(url, f"{BASE}/v1/chat/completions", CALL) as response:
            assert (response.status, "gateway.max_answer_bytes" in await response.text()) == (502, True)
        assert fake.completions == 1

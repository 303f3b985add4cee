"""Completions, responses and messages through the gateway; ids by path, header and token; external providers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Literal

import aiohttp
import openai
import pytest
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.protocols import BY_ROUTE
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.settings import BackendSettings
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import FakePublisher, client, gateway
from tests.producers.test_gateway_streaming import data_of, raw

BASE = "/rollout/r1/attempt/a1"
TOOL: Any = {"type": "function", "name": "weather", "parameters": {}, "strict": False}


@asynccontextmanager
async def posted(url: str, path: str, body: Any, **headers: str) -> AsyncGenerator[aiohttp.ClientResponse]:
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{url}{path}", json=body) as response,
    ):
        yield response


async def answered(url: str, path: str, body: Any, **headers: str) -> Any:
    async with posted(url, path, body, **headers) as response:
        assert response.status == 200, await response.text()
        return await response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_recorded_with_what_vllm_gives(stream: bool):
    publisher = FakePublisher()
    async with (
        FakePolicyServer(weights=7, label="9", gives_versions=False) as backend,
        gateway(publisher, backend.url) as url,
        client(url) as agent,
    ):
        answer: Any = await agent.responses.create(model="policy", input="2+2?", instructions="Be brief", stream=stream)
        events = [event async for event in answer] if stream else []
    final = events[-1].response if stream else answer
    assert final.output_text == "answer 0"
    assert final.output[0].content[0].logprobs is None
    assert final.model_dump()["output_messages"] is None
    assert not any(event.logprobs for event in events if event.type == "response.output_text.delta")
    (span,) = publisher.spans
    assert (span.operation, span.status, span.finish_reason) == ("chat", "ok", "stop")
    assert (span.prompt_token_ids, span.response_token_ids) == ([1, 2, 3, 4], [7, 7, 7])
    assert span.logprobs == [-0.125, -0.25, -0.375]
    assert span.weight_versions == [VersionSpan(version=9, start=0, end=3)]
    assert json.loads(span.input) == {"instructions": "Be brief", "input": "2+2?"}
    assert json.loads(span.output)[0]["content"][0]["text"] == "answer 0"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_calls_a_tool_has_ids_but_no_logprobs(stream: bool):
    publisher = FakePublisher()
    async with (
        FakePolicyServer(label="9") as backend,
        gateway(publisher, backend.url) as url,
        client(url) as agent,
    ):
        answer: Any = await agent.responses.create(model="policy", input="2+2?", tools=[TOOL], stream=stream)
        if stream:
            async for _ in answer:
                pass
    (span,) = publisher.spans
    assert (span.status, span.finish_reason, len(span.response_token_ids)) == ("ok", "tool_calls", 3)
    assert not span.is_llm_call
    assert not publisher.dead


async def test_a_response_in_the_background_is_refused():
    async with FakePolicyServer() as backend, gateway(FakePublisher(), backend.url) as url, client(url) as agent:
        with pytest.raises(openai.BadRequestError) as refused:
            await agent.responses.create(model="policy", input="2+2?", background=True)
    assert refused.value.param == "background"


async def test_a_response_that_breaks_off_raises_in_openais_client():
    publisher = FakePublisher()
    async with (
        FakePolicyServer(label="9", cut_after=6) as backend,
        gateway(publisher, backend.url) as url,
        client(url) as agent,
    ):
        stream = await agent.responses.create(model="policy", input="2+2?", stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
    (span,) = publisher.spans
    assert (span.status, span.finish_reason, span.output) == ("error", "", "answ")
    assert span.attributes["error.type"] == "backend_broken"


MESSAGE: Any = {"model": "policy", "max_tokens": 9, "messages": [{"role": "user", "content": "2+2?"}]}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_is_recorded_by_its_texts_and_passes_unchanged(stream: bool):
    publisher = FakePublisher()
    asked = MESSAGE | {"system": "Be brief", "stream": stream}
    async with FakePolicyServer(weights=7, label="1") as backend, gateway(publisher, backend.url) as url:
        async with posted(url, f"{BASE}/v1/messages", asked) as response:
            through = await response.read()
        async with posted(backend.url, "/v1/messages", asked) as response:
            past = await response.read()
    assert (data_of(through) == data_of(past)) if stream else (json.loads(through) == json.loads(past))
    assert backend.requests[0] == asked
    (span,) = publisher.spans
    assert (span.operation, span.status, span.finish_reason) == ("chat", "ok", "end_turn")
    assert (span.response_token_ids, span.input_tokens, span.output_tokens) == ([], 4, 3)
    assert json.loads(span.input) == {"system": "Be brief", "messages": MESSAGE["messages"]}
    assert json.loads(span.output) == {"role": "assistant", "content": [{"type": "text", "text": "answer 0"}]}
    assert span.attributes["gen_ai.request.max_tokens"] == 9
    assert not publisher.dead


@pytest.mark.parametrize("stream", [False, True])
async def test_the_versions_around_a_message_are_recorded_though_it_has_no_ids(stream: bool):
    publisher = FakePublisher()
    async with FakePolicyServer(weights=7, label="12") as backend, gateway(publisher, backend.url) as url:
        async with posted(url, f"{BASE}/v1/messages", MESSAGE | {"stream": stream}) as response:
            await response.read()
        backend.faults["/v1/messages"] = lambda: setattr(backend, "label", "13")
        async with posted(url, f"{BASE}/v1/messages", MESSAGE | {"stream": stream}) as response:
            await response.read()
    labels = [span.attributes["fulgurite.weight_version_labels"] for span in publisher.spans]
    assert labels == [["12", "12"], ["12", "13"]]
    assert not any(span.weight_versions for span in publisher.spans), "these are of token ids"


async def test_a_message_that_uses_a_tool_is_put_together():
    publisher = FakePublisher()
    tool = {"name": "weather", "input_schema": {"type": "object"}}
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await raw(url, f"{BASE}/v1/messages", tools=[tool], max_tokens=9)
    (span,) = publisher.spans
    assert span.finish_reason == "tool_use"
    assert json.loads(span.output)["content"] == [
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bern"}}
    ]


async def test_a_message_passes_byte_for_byte_and_long_numbers_are_recorded_whole():
    publisher = FakePublisher()
    used = {"type": "tool_use", "id": "t", "name": "f", "input": {"account": 123456789012345678901, "x": 1.0}}
    tool = {"name": "f", "input_schema": {"type": "object"}}
    partial = b'"partial_json": "{\\"account\\":123456789012345678901}"'

    def mend_event(_: int, event: bytes) -> bytes:
        return event.replace(b'"partial_json": "{\\"city\\":"', partial).replace(b'"\\"Bern\\"}"', b'""')

    backend = FakePolicyServer(label="1", mend=lambda body: body | {"content": [used]}, mend_event=mend_event)
    async with backend, gateway(publisher, backend.url) as url:
        async with posted(url, f"{BASE}/v1/messages", MESSAGE) as response:
            assert await response.read() == json.dumps(json.loads(await response.read())).encode()
        await raw(url, f"{BASE}/v1/messages", tools=[tool], max_tokens=9)
    whole, streamed = (json.loads(span.output)["content"][0] for span in publisher.spans)
    assert whole == used
    assert streamed["input"] == {"account": 123456789012345678901}


async def test_anthropics_clients_get_errors_in_their_shape():
    async with FakePolicyServer(cut_after=3) as backend, gateway(FakePublisher(), backend.url) as url:
        async with posted(url, f"{BASE}/v1/messages", {"model": "policy", "messages": []}) as response:
            refused = await response.json()
        _, body = await raw(url, f"{BASE}/v1/messages", max_tokens=9)
    assert (response.status, refused["type"]) == (400, "error")
    assert refused["error"]["type"] == "invalid_request_error"
    assert data_of(body)[-1]["error"]["type"] == "api_error"
    assert b"event: error\n" in body
    assert b"message_stop" not in body


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"{BASE}/v1/chat/completions", {}),
        ("/v1/chat/completions", {"x-rollout-id": "r1", "x-attempt-id": "a1"}),
        ("/v1/chat/completions", {"authorization": "Bearer fg-r1/a1"}),
        ("/v1/chat/completions", {"authorization": "Bearer fg-r1/a1/some-key"}),
        ("/v1/chat/completions", {"x-api-key": "fg-r1/a1"}),
        (f"{BASE}/v1/chat/completions", {"authorization": "Bearer fg-r2/a2"}),
    ],
)
async def test_ids_come_by_path_header_or_token(path: str, headers: dict[str, str]):
    publisher = FakePublisher()
    asked = {"model": "policy", "messages": [{"role": "user", "content": "2+2?"}]}
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await answered(url, path, asked, **headers)
    (span,) = publisher.spans
    assert (span.rollout_id, span.attempt_id, span.status) == ("r1", "a1", "ok")
    assert "some-key" not in span.model_dump_json()


async def test_without_ids_it_is_a_proxy_that_records():
    publisher = FakePublisher()
    asked = {"model": "policy", "messages": [{"role": "user", "content": "2+2?"}]}
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await answered(url, "/v1/chat/completions", asked, authorization="Bearer sk-any")
    assert (publisher.spans[0].rollout_id, len(publisher.spans[0].response_token_ids)) == ("", 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_external_provider_is_asked_what_the_agent_asked_and_is_no_dead_letter(stream: bool):
    publisher = FakePublisher()
    asked = {"model": "gpt", "messages": [{"role": "user", "content": "2+2?"}], "seed": 3, "stream": stream}
    async with FakePolicyServer() as provider:
        backends = [BackendSettings(url=provider.url, kind="openai", models=["gpt"])]
        async with (
            gateway(publisher, provider.url, backends=backends) as url,
            posted(url, f"{BASE}/v1/chat/completions", asked) as response,
        ):
            through = await response.read()
    assert provider.requests == [asked | ({"stream_options": {"include_usage": True}} if stream else {})]
    assert (b"[DONE]" in through) is stream
    (span,) = publisher.spans
    assert (span.status, span.finish_reason, span.resource) == ("ok", "stop", "")
    assert (span.response_token_ids, span.prompt_token_ids) == ([], [])
    assert json.loads(span.output)["content"] == "answer 0"
    assert span.endpoint == provider.url
    assert not publisher.dead


@pytest.mark.parametrize(
    ("changes", "constraints"),
    [
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"response_format": {"type": "text"}, "tool_choice": "auto", "logit_bias": {}}, None),
        ({"tool_choice": "required", "logit_bias": {"5": 1}}, ["tool_choice", "logit_bias"]),
        ({"use_beam_search": True, "vllm_xargs": {"own": 1}}, ["use_beam_search", "vllm_xargs"]),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, ["tools"]),
    ],
)
async def test_what_forbids_tokens_is_named(changes: Any, constraints: list[str] | None):
    publisher = FakePublisher()
    asked = {"model": "policy", "messages": [{"role": "user", "content": "2+2?"}]} | changes
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await answered(url, f"{BASE}/v1/chat/completions", asked)
    assert {name: backend.requests[0][name] for name in changes} == changes, "JSON mode and the like pass on"
    assert publisher.spans[0].attributes.get("fulgurite.request.constraints") == constraints


async def test_nothing_but_the_models_routes_is_reached():
    async with (
        FakePolicyServer() as backend,
        gateway(FakePublisher(), backend.url) as url,
        aiohttp.ClientSession() as session,
    ):
        backend.faults["/pause"] = lambda: JSONResponse({"reached": True})
        for path in ("/pause", "/collective_rpc", "/v1/../pause", f"{BASE}/pause", f"{BASE}/v1/%2e%2e/pause"):
            async with session.post(f"{url}{path}", json={}) as response:
                assert response.status == 404, path
    assert "/pause" not in backend.log


async def test_tokens_of_a_message_are_counted_without_a_record():
    publisher = FakePublisher()
    async with FakePolicyServer() as backend, gateway(publisher, backend.url) as url:
        counted = await answered(url, f"{BASE}/v1/messages/count_tokens", MESSAGE)
        backend.faults["/v1/messages/count_tokens"] = lambda: JSONResponse({}, status_code=503)
        async with (
            aiohttp.ClientSession(headers={"x-request-timeout": "0.3"}) as session,
            session.post(f"{url}{BASE}/v1/messages/count_tokens", json=MESSAGE) as response,
        ):
            refused = await response.json()
    assert counted == {"input_tokens": 4}
    assert (refused["type"], refused["error"]["code"]) == ("error", "backend_unavailable")
    assert not publisher.spans


@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (Response("<html>log in</html>", media_type="text/html"), 502, "is not JSON"),
        (JSONResponse(["4"]), 502, "has no input_tokens"),
        (JSONResponse({"input_tokens": None}), 502, "has no input_tokens"),
        (Response(status_code=204), 502, "answered 204"),
        (Response(status_code=302, headers={"location": "/login"}), 502, "answered 302"),
        (JSONResponse({"error": {"message": "too long"}}, status_code=400), 400, "too long"),
    ],
)
async def test_what_is_no_count_of_tokens_is_an_error_for_the_agent(
    answer: Response, status: int, told: str, kind: Literal["vllm", "openai"]
):
    async with FakePolicyServer() as backend:
        backend.faults["/v1/messages/count_tokens"] = lambda: answer
        backends = [BackendSettings(url=backend.url, kind=kind, models=["policy"])]
        async with (
            gateway(FakePublisher(), backend.url, backends=backends) as url,
            posted(url, "/v1/messages/count_tokens", MESSAGE) as response,
        ):
            body = await response.json()
    assert (response.status, body["type"]) == (status, "error")
    assert told in body["error"]["message"]


def test_a_streamed_messages_signature_and_citations_are_recorded():
    """Without its signature a thought cannot be given back to the model."""
    cited = {"type": "char_location", "cited_text": "x"}
    deltas: list[tuple[int, dict[str, Any]]] = [
        (0, {"type": "thinking_delta", "thinking": "hm"}),
        (0, {"type": "signature_delta", "signature": "SI"}),
        (0, {"type": "signature_delta", "signature": "G"}),
        (1, {"type": "citations_delta", "citation": cited}),
        (1, {"type": "text_delta", "text": "a"}),
    ]
    thought, text = {"type": "thinking", "thinking": "", "signature": ""}, {"type": "text", "text": ""}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": "m"}},
        {"type": "content_block_start", "index": 0, "content_block": thought},
        {"type": "content_block_start", "index": 1, "content_block": text},
        *({"type": "content_block_delta", "index": index, "delta": delta} for index, delta in deltas),
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
        {"type": "message_stop"},
    ]
    stream = BY_ROUTE["/v1/messages"].stream({}, strip=False)
    for event in events:
        stream.feed(sse.Event(b"", json.dumps(event).encode()))
    stream.close()
    assert stream.outcome.choices[0].output["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "SIG"},
        {"type": "text", "text": "a", "citations": [cited]},
    ]

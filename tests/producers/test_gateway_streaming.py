"""Streamed answers: passed on as they come, recorded at their end, and what is left where they do not come to it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import openai
import pytest
from starlette.responses import JSONResponse

from fulgurite.producers.gateway import sse
from fulgurite.schemas.event import VersionSpan
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES, FakePublisher, client, gateway

CHAT = "/rollout/r1/attempt/a1/v1/chat/completions"


async def raw(url: str, path: str = CHAT, **changes: Any) -> tuple[int, bytes]:
    """(status, the body byte for byte) of a streamed call."""
    body = {"model": "policy", "messages": MESSAGES, "stream": True} | changes
    async with aiohttp.ClientSession() as session, session.post(f"{url}{path}", json=body) as response:
        return response.status, await response.read()


def data_of(body: bytes) -> list[Any]:
    """The events, without [DONE]."""
    events = [event.data for event in sse.Parser().feed(body)]
    return [json.loads(data) for data in events if data != b"[DONE]"]


async def chunks_of(url: str, **changes: Any) -> list[Any]:
    async with client(url) as agent:
        stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True, **changes)
        return [chunk async for chunk in stream]


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


async def test_a_stream_is_recorded_as_a_whole_answer_is():
    publisher = FakePublisher()
    async with FakePolicyServer(weights=7, label="17") as backend, gateway(publisher, backend.url) as url:
        chunks = await chunks_of(url, temperature=0.5, seed=3)
    assert text_of(chunks) == "answer 0"
    assert chunks[-1].choices[0].finish_reason == "stop"
    (span,) = publisher.spans
    assert (span.rollout_id, span.attempt_id, span.status, span.operation) == ("r1", "a1", "ok", "chat")
    assert (span.prompt_token_ids, span.response_token_ids) == ([1, 2, 3, 4], [7, 7, 7])
    assert span.logprobs == [-0.125, -0.25, -0.375]
    assert span.weight_versions == [VersionSpan(version=17, start=0, end=3)]
    assert (span.finish_reason, span.input_tokens, span.output_tokens) == ("stop", 4, 3)
    assert json.loads(span.output) == {"role": "assistant", "content": "answer 0"}
    assert span.attributes["gen_ai.request.stream"] is True
    assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] <= span.attributes["fulgurite.backend_seconds"]
    assert "seed" not in backend.requests[0]
    assert not publisher.dead


async def test_the_agent_gets_the_events_it_would_have_got():
    """Byte for byte in meaning: what the backend says to the agent's own request, and what it gets through us."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    async with (
        FakePolicyServer(weights=7, label="1", reply_tokens=12) as backend,
        gateway(FakePublisher(), backend.url) as url,
    ):
        cases: list[dict[str, Any]] = [
            {},
            {"n": 2},
            {"logprobs": True},
            {"return_token_ids": True, "stream_options": {"include_usage": True}},
            {"stream_options": {"include_usage": True}},
            {"tools": tools},
            {"logprobs": True, "return_token_ids": True, "return_weight_versions": True},
        ]
        for asked in cases:
            _, through = await raw(url, **asked)
            _, past = await raw(backend.url, "/v1/chat/completions", **asked)
            assert through.endswith(b"data: [DONE]\n\n")
            told, expected = data_of(through), data_of(past)
            for event in told + expected:
                for choice in event["choices"]:
                    if choice.get("token_ids", 0) is None:
                        del choice["token_ids"]
            # Empty deltas stand for tokens that the agent did not ask to see.
            if not asked.get("logprobs") and not asked.get("return_token_ids"):
                expected = [e for e in expected if not e["choices"] or e["choices"][0]["delta"] or _ends(e)]
            key = _order if asked.get("n") else (lambda event: 0)
            assert sorted(told, key=key) == sorted(expected, key=key), asked


def _ends(event: Any) -> bool:
    return bool(event["choices"][0]["finish_reason"])


def _order(event: Any) -> int:
    return event["choices"][0]["index"]


async def test_events_pass_on_while_the_answer_is_still_being_made():
    async with (
        FakePolicyServer(label="1", reply_tokens=8, event_seconds=0.05) as backend,
        gateway(FakePublisher(), backend.url) as url,
        client(url) as agent,
    ):
        stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                assert backend.sent_events < 6, "held back until the end"
                break
        await stream.close()


async def test_a_choice_of_a_stream_is_a_span():
    publisher = FakePublisher()
    async with FakePolicyServer(weights=5, label="1") as backend, gateway(publisher, backend.url) as url:
        chunks = await chunks_of(url, n=3)
    assert [text_of(chunks, index) for index in range(3)] == ["answer 0", "answer 1", "answer 2"]
    assert [json.loads(span.output)["content"] for span in publisher.spans] == ["answer 0", "answer 1", "answer 2"]
    assert all(span.response_token_ids == [5, 5, 5] and span.finish_reason == "stop" for span in publisher.spans)
    assert [span.attributes["fulgurite.choice"] for span in publisher.spans] == [0, 1, 2]


async def test_tool_calls_are_put_together():
    publisher = FakePublisher()
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    async with FakePolicyServer(label="1", reply_tokens=9) as backend, gateway(publisher, backend.url) as url:
        chunks = await chunks_of(url, tools=tools)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    (span,) = publisher.spans
    function = {"name": "weather", "arguments": '{"city":"Bern"}'}
    assert json.loads(span.output)["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]
    assert len(span.response_token_ids) == 9
    assert "gen_ai.tool.definitions" in span.attributes


async def test_the_end_waits_for_the_acknowledgement():
    publisher = FakePublisher(acknowledges=False)
    seen: list[Any] = []

    async def agent(url: str) -> None:
        async with client(url) as asking:
            stream = await asking.chat.completions.create(
                model="policy", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                seen.append(chunk)

    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        running = asyncio.create_task(agent(url))
        await until(lambda: publisher.waiting)
        await asyncio.sleep(0.1)
        assert seen, "nothing passed on before the end"
        assert not any(choice.finish_reason for chunk in seen for choice in chunk.choices), "the end passed unrecorded"
        assert not any(chunk.usage for chunk in seen)
        publisher.acknowledge()
        await running
    assert seen[-2].choices[0].finish_reason == "stop"
    assert seen[-1].usage.completion_tokens == 3


async def test_without_an_acknowledgement_the_stream_ends_with_an_error():
    publisher = FakePublisher(acknowledges=False)
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url, publish_seconds=0.2) as url:
        with pytest.raises(openai.APIError) as failure:
            await chunks_of(url)
        _, body = await raw(url)
    assert failure.value.code == "broker_unavailable"
    assert b"[DONE]" not in body
    assert b'"finish_reason":"stop"' not in body


async def test_an_agent_that_hangs_up_leaves_what_came_so_far():
    publisher = FakePublisher()
    async with (
        FakePolicyServer(weights=7, label="1", reply_tokens=1_000, event_seconds=0.01) as backend,
        gateway(publisher, backend.url) as url,
    ):
        async with client(url) as agent:
            stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
            got = 0
            async for _ in stream:
                got += 1
                if got == 5:
                    break
            await stream.close()
        await until(lambda: publisher.spans)
        await until(lambda: backend.streams == 0)  # the backend does not go on for nobody
    (span,) = publisher.spans
    assert (span.status, span.finish_reason) == ("error", "")
    assert span.attributes["error.type"] == "client_disconnected"
    assert span.prompt_token_ids == [1, 2, 3, 4]
    assert 3 <= len(span.response_token_ids) < 500
    assert len(span.logprobs) == len(span.response_token_ids)
    assert span.weight_versions == [], "which version sampled them was not said yet"
    assert not publisher.dead


async def test_a_backend_that_breaks_off_is_an_error_event_and_an_error_span():
    publisher = FakePublisher()
    async with (
        FakePolicyServer(weights=7, label="1", reply_tokens=9, cut_after=4) as backend,
        gateway(publisher, backend.url) as url,
    ):
        with pytest.raises(openai.APIError) as failure:
            await chunks_of(url)
        status, body = await raw(url)
    assert failure.value.code == "backend_broken"
    assert (status, b"[DONE]" in body) == (200, False)
    assert data_of(body)[-1]["error"]["type"] == "server_error"
    assert {(span.status, span.finish_reason, len(span.response_token_ids)) for span in publisher.spans} == {
        ("error", "", 3)
    }
    assert not publisher.dead


async def test_a_backend_that_ends_early_without_breaking_is_the_same():
    publisher = FakePublisher()

    def silent_end(number: int, event: bytes) -> bytes:
        return event if number < 3 else b""

    async with FakePolicyServer(label="1", mend_event=silent_end) as backend, gateway(publisher, backend.url) as url:
        with pytest.raises(openai.APIError) as failure:
            await chunks_of(url)
    assert failure.value.code == "backend_broken"
    assert publisher.spans[0].status == "error"


async def test_an_error_that_the_backend_reports_within_its_stream_is_passed_on():
    publisher = FakePublisher()

    def fails(number: int, event: bytes) -> bytes:
        return event if number < 3 else b'data: {"error": {"message": "engine died", "code": 500}}\n\n'

    async with FakePolicyServer(label="1", mend_event=fails) as backend, gateway(publisher, backend.url) as url:
        with pytest.raises(openai.APIError, match="engine died"):
            await chunks_of(url)
    assert publisher.spans[0].attributes["error.type"] == "backend_error"
    assert not publisher.dead


@pytest.mark.parametrize("broken", [b"data: {\n\n", b"data: []\n\n", b'data: {"choices": 3}\n\n'])
async def test_a_malformed_event_is_a_dead_letter_and_an_error_event(broken: bytes):
    publisher = FakePublisher()

    def mends(number: int, event: bytes) -> bytes:
        return broken if number == 2 else event

    async with FakePolicyServer(label="1", mend_event=mends) as backend, gateway(publisher, backend.url) as url:
        with pytest.raises(openai.APIError) as failure:
            await chunks_of(url)
    assert failure.value.code == "backend_invalid"
    (span,) = publisher.spans
    assert (span.status, len(span.response_token_ids)) == ("error", 1)
    (dead,) = publisher.dead
    assert (dead.reason, dead.value) == ("backend_invalid", broken)


async def test_tokens_that_were_kept_from_us_are_noticed():
    """A stream without one of its chunks: the texts look right, the ids do not add up to the backend's own count."""
    publisher = FakePublisher()

    def loses(number: int, event: bytes) -> bytes:
        return b"" if number == 2 else event

    async with FakePolicyServer(label="1", mend_event=loses) as backend, gateway(publisher, backend.url) as url:
        await chunks_of(url)
    assert (publisher.spans[0].status, publisher.spans[0].response_token_ids) == ("error", [])
    assert publisher.dead[0].reason == "wrong_length"


async def test_a_refusal_before_the_first_event_has_its_status():
    publisher = FakePublisher()
    async with FakePolicyServer() as backend, gateway(publisher, backend.url) as url:
        refusal = {"error": {"message": "context too long", "param": "messages"}}
        backend.faults["/v1/chat/completions"] = lambda: JSONResponse(refusal, status_code=400)
        with pytest.raises(openai.BadRequestError, match="context too long"):
            await chunks_of(url)
        backend.faults["/v1/chat/completions"] = lambda: JSONResponse({"choices": []})
        with pytest.raises(openai.InternalServerError) as failure:
            await chunks_of(url)
    assert failure.value.code == "backend_invalid"
    assert [span.status for span in publisher.spans] == ["error", "error"]
    assert [dead.reason for dead in publisher.dead] == ["backend_invalid"]


async def test_a_slow_agent_slows_the_backend_and_costs_no_memory():
    """The agent reads nothing: the gateway must stop reading, too, and what is under way must fit into the sockets."""
    publisher = FakePublisher()

    def padded(number: int, event: bytes) -> bytes:
        return event.replace(b'"finish_reason": null', b'"finish_reason": null, "padding": "' + b"x" * 100_000 + b'"')

    async with (
        FakePolicyServer(label="1", reply_tokens=2_000, mend_event=padded) as backend,
        gateway(publisher, backend.url, silence_seconds=1.5) as url,
        aiohttp.ClientSession(read_bufsize=1_024) as session,
    ):
        asked = {"model": "policy", "messages": MESSAGES, "stream": True}
        async with session.post(f"{url}{CHAT}", json=asked) as response:
            await response.content.readany()
            await asyncio.sleep(0.5)
            after_a_while = backend.sent_events
            await asyncio.sleep(0.3)
            assert backend.sent_events - after_a_while <= 2, "read ahead of an agent that takes nothing"
            assert backend.sent_events < 1_000
            await until(lambda: publisher.spans)
    assert publisher.spans[0].attributes["error.type"] == "client_stalled"


def test_events_come_out_once_however_their_bytes_are_cut():
    stream = b'data: {"a": 1}\n\n: ping\n\nevent: x\r\ndata: 1\r\ndata: 2\r\n\r\ndata: [DONE]\n\n'
    expected = [b'{"a": 1}', b"", b"1\n2", b"[DONE]"]
    for size in range(1, len(stream) + 1):
        parser = sse.Parser()
        events = [event for at in range(0, len(stream), size) for event in parser.feed(stream[at : at + size])]
        assert [event.data for event in events] == expected, size


def test_a_very_long_event_in_small_pieces_costs_no_more_than_its_length():
    parser = sse.Parser()
    stream = b"data: " + b"x" * 20_000_000 + b"\n\n"
    began = time.process_time()
    events = [event for at in range(0, len(stream), 4_096) for event in parser.feed(stream[at : at + 4_096])]
    assert len(events[0].data) == 20_000_000
    assert time.process_time() - began < 2, "looked at again with every piece"

"""Agents and backends that send what nobody foresaw: every call has its span, and an answer that a program can read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.metrics import Metrics
from fulgurite.producers.gateway.token_route import GENERATE, RENDER
from fulgurite.schemas.settings import BackendSettings
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import MESSAGES, FakePublisher, gateway

ATTEMPT = "/rollout/r1/attempt/a1"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
DEEP = 300
"""Levels: more than orjson writes, less than it reads."""


def nested(levels: int = DEEP) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


async def post(url: str, route: str, body: dict[str, Any]) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}{ATTEMPT}{route}", data=BytesIO(orjson.dumps(body))) as answer,
    ):
        return answer.status, await answer.read()


class TokenServer(FakePolicyServer):
    """Has the routes for tokens too; `missing` answer 404."""

    missing: frozenset[str] = frozenset()
    served: int = 0
    """Derenderings that go well before it is missing."""
    structured: dict[str, Any] | None = None
    """The grammar that answers are held to."""
    sampling: Mapping[str, Any] = MappingProxyType({})
    """What it samples with by itself."""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        def route(answer: dict[str, Any]) -> Callable[[Request], Any]:
            async def handler(request: Request) -> Response:
                if request.url.path.rpartition("/")[2] in self.missing:
                    if self.served == 0:
                        return JSONResponse({"detail": "Not Found"}, status_code=404)
                    self.served -= 1
                return JSONResponse(answer)

            return handler

        sampling = {"max_tokens": 5, "structured_outputs": self.structured, **self.sampling}
        rendered = {"request_id": "x", "token_ids": [1, 2], "sampling_params": sampling, "model": "policy"}
        entry = {"token": "y", "token_id": 5, "logprob": -1.0, "bytes": [], "top_logprobs": []}
        choice = {
            "index": 0,
            "token_ids": [5, 6],
            "text": "y",
            "logprobs": {"content": [entry, entry | {"token_id": 6}]},
            "finish_reason": "stop",
            "weight_versions": [{"version": "1", "start": 0, "end": 2}],
        }
        message = {"role": "assistant", "content": "y"}
        usage = {"prompt_tokens": 2, "completion_tokens": 2}
        return [
            ("/v1/chat/completions/render", "POST", route(rendered)),
            ("/inference/v1/generate", "POST", route({"choices": [choice], "usage": usage})),
            ("/v1/chat/completions/derender", "POST", route({"choices": [{"index": 0, "message": message}]})),
            ("/detokenize", "POST", route({"prompt": "<end>"})),
        ]


@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": 5},
        {"tool_calls": [5, None]},
        {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[" * DEEP + "]" * DEEP}}]},
        {"content": 5, "reasoning": []},
        {"content": [[], {}], "tool_calls": {"a": 1}},
    ],
)
async def test_what_an_agent_echoes_never_breaks_its_call(said: dict[str, Any]):
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url) as url:
        messages = [*MESSAGES, {"role": "assistant"} | said, *MESSAGES]
        for _ in range(2):
            status, _ = await post(url, "/v1/chat/completions", {"model": "policy", "messages": messages})
            assert status == 200
    assert "/inference/v1/generate" in backend.log
    assert [span.status for span in publisher.spans] == ["ok", "ok"]


@pytest.mark.parametrize("missing", ["derender", "detokenize"])
async def test_that_a_route_is_missing_is_known_before_anything_is_sampled(missing: str):
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url) as url:
        backend.missing = frozenset({missing})
        status, _ = await post(url, "/v1/chat/completions", {"model": "policy", "messages": MESSAGES, "tools": TOOLS})
    assert status == 200
    assert "/inference/v1/generate" not in backend.log
    assert backend.log.count("/v1/chat/completions") == 1
    assert [span.status for span in publisher.spans] == ["ok"]


async def test_what_was_sampled_is_not_sampled_again_on_another_route_and_not_forgotten():
    """What cannot be put into words is no answer: the tokens are a dead letter, and of the rollout's budget."""
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url, max_rollout_tokens=4) as url:
        backend.missing, backend.served = frozenset({"derender"}), 1  # gone after it was probed
        body = {"model": "policy", "messages": MESSAGES, "tools": TOOLS}
        status, answer = await post(url, "/v1/chat/completions", body)
        assert (status, orjson.loads(answer)["error"]["code"]) == (502, "backend_invalid")
        assert (await post(url, "/v1/chat/completions", body))[0] == 429
    assert backend.log.count("/inference/v1/generate") == 1
    assert "/v1/chat/completions" not in backend.log
    assert [(span.status, span.input_tokens, span.output_tokens) for span in publisher.spans] == [("error", 2, 2)]
    assert [orjson.loads(dead.value or b"")["choices"][0]["token_ids"] for dead in publisher.dead] == [[5, 6]]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_a_server_refuses_are_asked_by_text(stream: bool):
    """A spliced prompt may be longer than the one that was rendered, which the chat route then answers."""
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url) as url:
        refused = JSONResponse({"error": {"message": "too long"}}, status_code=400)
        backend.faults[GENERATE] = lambda: refused
        body = {"model": "policy", "messages": MESSAGES, "stream": stream}
        status, answer = await post(url, "/v1/chat/completions", body)
    assert status == 200, answer
    assert [backend.log.count(route) for route in (GENERATE, "/v1/chat/completions")] == [1, 1]
    assert [span.status for span in publisher.spans] == ["ok"]


class SlowToSay(TokenServer):
    """Takes its time to say that it is well."""

    async def _health(self, request: Request) -> Response:
        await asyncio.sleep(0.3)
        return await super()._health(request)


@pytest.mark.parametrize("route", ["derender", "detokenize"])
async def test_a_backends_words_are_never_logged(route: str, caplog: pytest.LogCaptureFixture):
    """They may quote a prompt; the dead letter and the span have them."""
    caplog.set_level(logging.DEBUG)

    class Quoting(TokenServer):
        def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
            asked = iter([False])

            def quoting(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
                async def quoted(request: Request) -> Response:
                    if next(asked, True):  # the first is a probe
                        return JSONResponse({"error": {"message": "cannot parse MY-SECRET"}}, status_code=500)
                    return await handler(request)

                return quoted

            return [
                (path, verb, quoting(run) if path.endswith(f"/{route}") else run)
                for path, verb, run in super().more_routes()
            ]

    publisher = FakePublisher()
    async with Quoting(label="1") as backend, gateway(publisher, backend.url) as url:
        body = {"model": "policy", "messages": MESSAGES, "tools": TOOLS}
        await post(url, "/v1/chat/completions", body)
        await post(url, "/v1/chat/completions", {name: body[name] for name in ("model", "messages")} | {"stream": True})
    told = "".join(dead.message for dead in publisher.dead)
    assert ("MY-SECRET" in told) == (route == "derender")
    named = [span.span_id for span in publisher.spans if span.span_id in told]
    assert all(span_id in caplog.text for span_id in named)
    assert "MY-SECRET" not in caplog.text


async def test_the_first_call_waits_until_it_is_known_who_serves_its_model():
    async with SlowToSay(label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        assert (await post(url, "/v1/chat/completions", {"model": "policy", "messages": MESSAGES}))[0] == 200
    assert "/inference/v1/generate" in backend.log
    assert "/v1/chat/completions" not in backend.log


async def test_an_answer_does_without_how_its_turn_ends():
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url) as url:
        backend.faults["/detokenize"] = lambda: (
            Response(status_code=401) if "/inference/v1/generate" in backend.log else None
        )
        status, _ = await post(url, "/v1/chat/completions", {"model": "policy", "messages": MESSAGES})
    assert status == 200
    assert backend.log.count("/inference/v1/generate") == 1
    assert [span.status for span in publisher.spans] == ["ok"]


async def test_routes_are_probed_once_a_model():
    async with TokenServer(label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        for _ in range(3):
            body = {"model": "policy", "messages": MESSAGES, "tools": TOOLS}
            assert (await post(url, "/v1/chat/completions", body))[0] == 200
    assert backend.log.count("/v1/chat/completions/derender") == 1 + 3


def _output(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def mend(body: dict[str, Any]) -> Any:
        body["output"][0] |= changes
        return body

    return mend


RESPONSES = ("/v1/responses", {"model": "policy", "input": "hi"})
COUNTED = ("/v1/messages", {"model": "policy", "max_tokens": 5, "messages": MESSAGES})
CHAT = ("/v1/chat/completions", {"model": "policy", "messages": MESSAGES})


@pytest.mark.parametrize(
    ("asked", "mend"),
    [
        (RESPONSES, _output(content=["hi"])),
        (RESPONSES, lambda body: body | {"input_messages": 5, "output_messages": 5}),
        (RESPONSES, _output(content=[{"type": "output_text", "text": "a", "logprobs": 5}])),
        (COUNTED, lambda body: body | {"content": [{"type": "tool_use", "name": "f", "input": nested()}]}),
        (CHAT, lambda body: body | {"choices": [body["choices"][0] | {"message": {"content": nested()}}]}),
        (CHAT, lambda body: body | {"much": 10**30, "odd": float("nan")}),
        (CHAT, lambda body: body | {"choices": [{"index": []}]}),
        (CHAT, lambda body: body | {"choices": [body["choices"][0] | {"token_ids": [[5]] * 3}]}),
    ],
)
async def test_an_odd_answer_leaves_a_span_and_json(asked: Any, mend: Callable[[dict[str, Any]], Any]):
    publisher = FakePublisher()
    async with FakePolicyServer(label="1", mend=mend) as backend, gateway(publisher, backend.url) as url:
        status, answer = await post(url, *asked)
    said = orjson.loads(answer)
    (span,) = publisher.spans
    assert status == 200 or (status, said["error"]["code"]) == (502, "backend_invalid")
    assert span.status == "ok" or publisher.dead
    assert span.status == "error" or (status == 200 and span.output)


async def test_an_answer_nested_without_end_is_an_error_with_a_dead_letter():
    publisher = FakePublisher()
    body = orjson.dumps({"id": "m", "role": "assistant", "content": "DEEP", "stop_reason": "end_turn"})
    answer = body.replace(b'"DEEP"', b"[" * 1_000 + b"]" * 1_000)
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        backend.faults["/v1/messages"] = lambda: Response(answer, media_type="application/json")
        status, said = await post(url, *COUNTED)
    assert (status, orjson.loads(said)["error"]["code"]) == (502, "backend_invalid")
    assert [span.status for span in publisher.spans] == ["error"]
    assert [dead.value for dead in publisher.dead] == [answer]


def _events(*events: Any) -> Callable[[], Response]:
    raw = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
    return lambda: Response(raw, media_type="Text/Event-Stream")


@pytest.mark.parametrize(
    ("asked", "event"),
    [
        (RESPONSES, {"type": "response.output_item.added", "item": {"content": ["hi"]}}),
        (RESPONSES, {"type": "response.output_text.delta", "delta": "a", "logprobs": 5}),
        (COUNTED, {"type": "content_block_delta", "index": 0, "delta": {"type": []}}),
        (COUNTED, {"type": "content_block_delta", "index": [], "delta": {"type": "text_delta", "text": "a"}}),
    ],
)
async def test_a_stream_with_an_odd_event_ends_with_an_error_event(asked: Any, event: Any):
    publisher = FakePublisher()
    route, body = asked
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        backend.faults[route] = _events({"type": "begun"}, event)
        status, answer = await post(url, route, body | {"stream": True})
    assert status == 200
    assert b'"code":"backend_' in answer
    assert [span.status for span in publisher.spans] == ["error"]


@pytest.mark.parametrize("levels", [DEEP, 1_000])
async def test_a_streamed_tool_input_nested_deep_is_recorded(levels: int):
    publisher = FakePublisher()
    text = "[" * levels + "]" * levels
    events = [
        {"type": "message_start", "message": {"id": "m", "model": "policy", "usage": {"input_tokens": 4}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "name": "f"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": text}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        backend.faults["/v1/messages"] = _events(*events)
        status, answer = await post(url, "/v1/messages", COUNTED[1] | {"stream": True})
    (span,) = publisher.spans
    assert status == 200
    assert (span.status == "ok") == (levels == DEEP) == (b"message_stop" in answer)
    assert len(publisher.dead) == (span.status == "error")


async def test_a_failure_of_ours_is_told_in_openais_shape(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    async def fails(*_: Any) -> None:
        raise KeyError("a prompt")

    monkeypatch.setattr(Gateway, "_call", fails)
    async with FakePolicyServer(label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        status, answer = await post(url, *CHAT)
    assert (status, orjson.loads(answer)["error"]["code"]) == (500, "internal_error")
    assert "KeyError at" in caplog.text
    assert "a prompt" not in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"logprobs": {"content": [{"logprob": 3.0}] * 3}},
        {"logprobs": {"content": [{"logprob": "-1"}] * 3}},
        {"logprobs": {"content": [{"logprob": False}] * 3}},
        {"token_ids": [True, 5, 5]},
        {"token_ids": [-1, 5, 5]},
        {"token_ids": ["5", 5, 5]},
    ],
)
async def test_what_is_no_token_is_rejected(change: dict[str, Any]):
    publisher = FakePublisher()

    def mend(body: dict[str, Any]) -> Any:
        return body | {"choices": [body["choices"][0] | change]}

    async with FakePolicyServer(label="1", mend=mend) as backend, gateway(publisher, backend.url) as url:
        await post(url, *CHAT)
    (span,) = publisher.spans
    assert (span.status, span.response_token_ids) == ("error", [])
    assert [dead.reason for dead in publisher.dead] == ["bad_field"]


async def test_rounding_above_zero_is_a_logprob():
    publisher = FakePublisher()

    def mend(body: dict[str, Any]) -> Any:
        return body | {"choices": [body["choices"][0] | {"logprobs": {"content": [{"logprob": 5e-7}] * 3}}]}

    async with FakePolicyServer(label="1", mend=mend) as backend, gateway(publisher, backend.url) as url:
        await post(url, *CHAT)
    assert [span.status for span in publisher.spans] == ["ok"]


async def test_a_long_prompt_with_many_answers_is_recorded_once():
    publisher = FakePublisher(max_bytes=8_000_000)
    messages = [{"role": "user", "content": "x" * 1_500_000}]
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        for count in (2, 8):
            body = {"model": "policy", "messages": messages, "n": count}
            assert (await post(url, "/v1/chat/completions", body))[0] == 200
    few, many = publisher.spans[:2], publisher.spans[2:]
    assert [len(span.input) > 1_500_000 for span in few] == [True, True]
    assert [len(span.input) > 1_500_000 for span in many] == [True] + [False] * 7
    assert [span.attributes.get("fulgurite.input_of_choice") for span in many] == [None] + [0] * 7
    assert all(span.response_token_ids for span in many)


async def test_each_of_long_prompts_is_recorded_once():
    publisher = FakePublisher(max_bytes=8_000_000)
    prompts = ["x" * 1_500_000, "y" * 1_500_000]
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        body = {"model": "policy", "prompt": prompts, "n": 2}
        assert (await post(url, "/v1/completions", body))[0] == 200
    assert [span.input[:1] for span in publisher.spans] == ["x", "", "y", ""]
    assert [span.attributes.get("fulgurite.input_of_choice") for span in publisher.spans] == [None, 0, None, 2]


GOOD = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}'
OPENING = b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\xef\xbb\xbf" + OPENING + GOOD + b"\n\ndata: [DONE]\n\n", "ok"),
        (OPENING + GOOD + b"\n\ndata: [DONE]", "ok"),
        (OPENING + GOOD, "ok"),
        (OPENING + GOOD[:-2], "error"),
        (OPENING + b'data: {"object":"ping"}\n\n' + GOOD + b"\n\ndata: [DONE]\n\n", "ok"),
        (OPENING + b'data: {"choices":5}\n\n' + GOOD + b"\n\n", "error"),
    ],
)
async def test_streams_of_providers_pass_whatever_their_manners(raw: bytes, status: str):
    publisher = FakePublisher()
    body = {"model": "gpt", "messages": MESSAGES, "stream": True}
    async with FakePolicyServer() as provider:
        provider.faults[CHAT[0]] = lambda: Response(raw, headers={"content-type": "Text/Event-Stream; charset=utf-8"})
        backends = [BackendSettings(url=provider.url, kind="openai", models=["gpt"])]
        async with gateway(publisher, provider.url, backends=backends) as url:
            _, through = await post(url, CHAT[0], body)
    (span,) = publisher.spans
    assert (span.status, b"error" in through) == (status, status == "error"), through
    if status == "ok":
        assert (orjson.loads(span.output)["content"], span.finish_reason) == ("hi", "stop")
        assert span.attributes["gen_ai.response.id"] == "c"
        assert b"ping" in through or b"ping" not in raw


async def test_an_event_of_the_policy_without_choices_is_none():
    publisher = FakePublisher()
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url) as url:
        backend.faults[CHAT[0]] = _events({"object": "ping"})
        _, through = await post(url, CHAT[0], CHAT[1] | {"stream": True})
    assert b"backend_invalid" in through
    assert publisher.dead


def test_a_byte_order_mark_may_come_in_pieces():
    parser = sse.Parser()
    raw = b"\xef\xbb\xbfdata: a\n\ndata: b"
    events = [event.data for at in range(len(raw)) for event in parser.feed(raw[at : at + 1])]
    assert [*events, *(event.data for event in parser.end())] == [b"a", b"b"]
    assert parser.end() == []


async def test_an_earlier_answer_that_is_not_known_is_counted_as_such(monkeypatch: pytest.MonkeyPatch):
    turns: list[str] = []
    monkeypatch.setattr(Metrics, "prompt", lambda _, turn: turns.append(turn))  # pyright: ignore[reportUnknownLambdaType]
    async with TokenServer(label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        unknown = [*MESSAGES, {"role": "assistant", "content": "not what was said"}, *MESSAGES]
        for messages in (MESSAGES, unknown):
            status, _ = await post(url, "/v1/chat/completions", {"model": "policy", "messages": messages})
            assert status == 200
    assert turns == ["begins", "unknown_turn"]


async def test_that_the_closing_of_an_answer_cannot_be_asked_costs_no_call_its_answer():
    def breaks() -> Response | None:
        return (
            JSONResponse({"error": {"message": "it broke"}}, status_code=500) if backend.log.count(RENDER) > 1 else None
        )

    async with TokenServer(label="1") as backend, gateway(FakePublisher(), backend.url) as url:
        backend.faults[RENDER] = breaks
        status, _ = await post(url, "/v1/chat/completions", {"model": "policy", "messages": MESSAGES})
    assert status == 200
    assert "/inference/v1/generate" in backend.log

"""What a request's fields become on the token route, and which of them the chat route has to answer."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import orjson
import pytest
from starlette.responses import Response

from fulgurite.producers.gateway.token_route import GENERATE, can_answer
from fulgurite.streams.assembler.join import sampled_neutrally
from tests.producers.gateway_support import MESSAGES, FakePublisher, gateway
from tests.producers.test_gateway_hostile import TOOLS, TokenServer, post

BODY: dict[str, Any] = {"model": "policy", "messages": MESSAGES}
STRICT: Any = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}]
TAG: dict[str, Any] = {"structural_tag": "{}"}


class HeldServer(TokenServer):
    structured = TAG


@pytest.mark.parametrize(
    ("server", "fields", "constraints"),
    [
        (HeldServer, {"tools": STRICT}, ["structured_outputs"]),
        (HeldServer, {"tools": TOOLS}, ["structured_outputs"]),  # --tool-strict-level
        (TokenServer, {"tools": STRICT}, None),  # a parser without a grammar: sampled as any other
        (HeldServer, {"response_format": {"type": "json_object"}}, ["response_format", "structured_outputs"]),
        (HeldServer, {"tools": TOOLS, "stream": True}, ["structured_outputs"]),
        (TokenServer, {"tools": TOOLS, "parallel_tool_calls": False}, None),
    ],
)
async def test_the_server_says_whether_it_held_an_answer_to_a_grammar(
    server: type[TokenServer], fields: dict[str, Any], constraints: list[str] | None
):
    publisher = FakePublisher()
    async with server(label="1") as backend, gateway(publisher, backend.url) as url:
        status, _ = await post(url, "/v1/chat/completions", BODY | fields)
    assert status == 200
    assert ("/inference/v1/generate" in backend.log) is ("stream" not in fields)
    (span,) = publisher.spans
    assert (span.status, span.attributes.get("fulgurite.request.constraints")) == ("ok", constraints)


@pytest.mark.parametrize(
    ("fields", "by_tokens"),
    [
        ({"prompt_logprobs": 1}, False),
        ({"prompt_logprobs": 0}, False),
        ({"echo": True}, False),
        ({"echo": False, "prompt_logprobs": None}, True),
        ({"return_prompt_text": True}, False),
        ({"return_tokens_as_token_ids": True, "logprobs": True}, False),
        ({"continue_final_message": True}, False),
        ({"use_beam_search": True}, False),
        ({"a_field_yet_to_come": 1}, False),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, False),
        ({"temperature": 0.5, "stop": ["x"], "logprobs": True, "top_logprobs": 2, "n": 1, "user": "me"}, True),
    ],
)
async def test_what_the_token_routes_do_not_give_is_asked_of_the_chat_route(fields: dict[str, Any], by_tokens: bool):
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url) as url:
        status, _ = await post(url, "/v1/chat/completions", BODY | fields)
    assert status == 200
    assert ("/inference/v1/generate" in backend.log) is by_tokens
    assert ("/v1/chat/completions" in backend.log) is not by_tokens
    assert [span.status for span in publisher.spans] == ["ok"]
    assert can_answer({"stream_options": {"include_usage": True, "continuous_usage_stats": False}})
    if not by_tokens:
        given = fields | {"return_token_ids": True}
        assert {name: backend.requests[-1].get(name) for name in given} == given


CHOICE: dict[str, Any] = {
    "index": 0,
    "text": "y",
    "token_ids": [5],
    "logprobs": {"content": [{"token": "y", "logprob": -1.0, "top_logprobs": []}]},
    "finish_reason": "stop",
    "weight_versions": [{"version": "1", "start": 0, "end": 1}],
}
STREAMED = b"data: " + orjson.dumps({"choices": [CHOICE]}) + b"\n\ndata: [DONE]\n\n"


class OpinionatedServer(TokenServer):
    """Samples as a model's generation_config.json says, where a request leaves it open."""

    sampling = MappingProxyType({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1})


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"tools": TOOLS}, {"tools": TOOLS, "stream": True}])
async def test_the_servers_own_sampling_is_recorded_and_keeps_a_call_from_training(fields: dict[str, Any]):
    publisher = FakePublisher()
    async with OpinionatedServer(label="1") as backend, gateway(publisher, backend.url) as url:
        if fields == {"stream": True}:
            backend.faults[GENERATE] = lambda: Response(STREAMED, media_type="text/event-stream")
        status, _ = await post(url, "/v1/chat/completions", BODY | fields)
    assert status == 200
    (span,) = publisher.spans
    said = {name: value for name, value in span.attributes.items() if name.startswith("gen_ai.request.")}
    said.pop("gen_ai.request.stream", None)
    assert said == {"gen_ai.request.temperature": 0.6, "gen_ai.request.top_p": 0.95, "gen_ai.request.top_k": 20}
    assert not sampled_neutrally(span)


async def test_what_a_request_asks_for_stays_where_the_server_does_so():
    publisher = FakePublisher()
    async with TokenServer(label="1") as backend, gateway(publisher, backend.url) as url:
        await post(url, "/v1/chat/completions", BODY | {"temperature": 1, "top_k": -1})
    (span,) = publisher.spans
    assert (span.attributes["gen_ai.request.temperature"], span.attributes["gen_ai.request.top_k"]) == (1, -1)
    assert sampled_neutrally(span)

"""What a request's fields become on the token route, and which of them the chat route has to answer."""

from __future__ import annotations

from typing import Any

import pytest

from fulgurite.producers.gateway.token_route import can_answer
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

"""What a request's fields become on the token route, and which of them the chat route has to answer."""

from __future__ import annotations

from typing import Any

import pytest

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
        (HeldServer, {"tools": STRICT, "stream": True}, ["tools"]),  # by the chat route, which does not say
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

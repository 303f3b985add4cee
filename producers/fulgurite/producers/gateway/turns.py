"""Whether a request goes on with an earlier answer of the model, by each protocol's own messages. Pure.

Says it of any body without raising: what agents send is checked by who answers. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from fulgurite.producers.gateway.protocols.base import Api, Json

_OF_THE_MODEL: Final = frozenset({"function_call", "custom_tool_call", "reasoning"})
"""Types of the items of a response that have no role."""
_MESSAGES: Final = {"/v1/chat/completions": "messages", "/v1/messages": "messages", "/v1/responses": "input"}


def has_turn(api: Api, body: Json) -> bool | None:
    """None where requests have no turns: a completion's prompt may be anything."""
    field = _MESSAGES.get(api.route)
    if field is None:
        return None
    given = body.get(field)
    if isinstance(given, list) and has_answer(given):
        return True
    return api.route == "/v1/responses" and bool(body.get("previous_response_id"))


def has_answer(messages: Iterable[Any]) -> bool:
    """Whether one of these is the model's."""
    return any(
        isinstance(message, Mapping) and (message.get("role") == "assistant" or message.get("type") in _OF_THE_MODEL)
        for message in messages
    )

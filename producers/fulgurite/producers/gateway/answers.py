"""What the agent gets: the backend's answer without what only we asked for. Pure functions."""

from __future__ import annotations

from typing import Any

import orjson

from fulgurite.producers.gateway.backend import Answer
from fulgurite.producers.gateway.calls import Call, loads_lenient
from fulgurite.producers.gateway.errors import ApiError

MAX_MESSAGE_CHARS = 2_000


def parse_completion(answer: Answer) -> dict[str, Any]:
    """The backend's 200 as a chat completion. Raises ApiError(502) when it is none."""
    try:
        response = answer.json()
    except ValueError:
        raise ApiError(502, "backend_invalid", "the policy server's answer is not JSON") from None
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise ApiError(502, "backend_invalid", "the policy server's answer has no choices")
    return response


def stripped(call: Call, response: dict[str, Any]) -> bytes:
    """The body for the agent: token ids, logprobs and versions only where it asked for them itself."""
    if not call.asked_for("return_token_ids"):
        response.pop("prompt_token_ids", None)
    for choice in response["choices"]:
        if not call.asked_for("return_token_ids"):
            choice.pop("token_ids", None)
        if not call.asked_for("return_weight_versions"):
            choice.pop("weight_versions", None)
        if not call.asked_for("logprobs"):
            choice["logprobs"] = None
    return orjson.dumps(response)


def backend_error(answer: Answer) -> ApiError:
    """The backend's refusal, with its status and its words, whatever shape it gave them."""
    try:
        body = loads_lenient(answer.body)
    except ValueError:
        body = None
    inner = body.get("error", body) if isinstance(body, dict) else None
    found: dict[str, Any] = inner if isinstance(inner, dict) else {"message": inner} if inner else {}
    message = str(found.get("message") or found.get("detail") or f"the policy server answered {answer.status}")
    param = found.get("param")
    # A redirect or a 1xx is no answer a client of a chat completion can use.
    status = answer.status if 400 <= answer.status <= 599 else 502
    return ApiError(
        status, "backend_error", message[:MAX_MESSAGE_CHARS], param=param if isinstance(param, str) else None
    )

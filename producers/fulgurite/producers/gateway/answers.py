"""A whole answer of the backend: its JSON, and its refusals in our words. Pure functions."""

from __future__ import annotations

import json
from typing import Any

import orjson

from fulgurite.producers.gateway.errors import BACKEND_ERROR, ApiError
from fulgurite.producers.gateway.protocols.base import invalid

MAX_MESSAGE_CHARS = 2_000


def parse_answer(body: bytes) -> Any:
    """The backend's 200. Raises ApiError(502) when it is not JSON."""
    try:
        return loads_lenient(body)
    except ValueError:
        raise invalid("is not JSON") from None


def backend_error(status: int, answer: bytes) -> ApiError:
    """The backend's refusal, with its status and its words, whatever shape it gave them."""
    try:
        body = loads_lenient(answer)
    except ValueError:
        body = None
    inner = body.get("error", body) if isinstance(body, dict) else None
    found: dict[str, Any] = inner if isinstance(inner, dict) else {"message": inner} if inner else {}
    message = str(found.get("message") or found.get("detail") or f"the policy server answered {status}")
    param = found.get("param")
    # A redirect or a 1xx is no answer a client of a model can use.
    return ApiError(
        status if 400 <= status <= 599 else 502,
        BACKEND_ERROR,
        message[:MAX_MESSAGE_CHARS],
        param=param if isinstance(param, str) else None,
    )


def loads_lenient(data: bytes) -> Any:
    """JSON as Python's json module writes it: NaN, Infinity and half surrogate pairs included. Raises ValueError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(json.dumps(json.loads(data), ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deep") from None

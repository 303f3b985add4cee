"""A whole answer of the backend: its JSON, and its refusals in our words. Pure functions."""

from __future__ import annotations

from typing import Any

from fulgurite.producers.gateway.errors import BACKEND_ERROR, Aborted, ApiError, Headers, ProviderError
from fulgurite.producers.gateway.exchange import Exchange
from fulgurite.producers.gateway.protocols.base import Api, invalid, loads_lenient, whole_number

MAX_MESSAGE_CHARS = 2_000
MAX_WORD_CHARS = 200
"""Of a type, a code or a header of an error."""
PASSED_HEADERS = ("retry-after", "x-should-retry")
"""What OpenAI's clients ask of an error, beside its status."""


def parse_answer(body: bytes) -> Any:
    """The backend's 200. Raises ApiError(502) when it is not JSON."""
    try:
        return loads_lenient(body)
    except ValueError:
        raise invalid("is not JSON") from None


def ensure_not_aborted(api: Api, exchange: Exchange, answer: bytes) -> None:
    """Raises Aborted for a whole answer that its backend ended before its end."""
    if not api.seems_aborted(answer):
        return
    try:
        response = loads_lenient(answer)
    except ValueError:
        return  # no answer at all, as whoever reads it will say
    if api.is_aborted(response, ours=exchange.kind == "vllm"):
        raise Aborted(response)


def ensure_count(exchange: Exchange, answer: bytes) -> None:
    """That it is an answer to count_tokens. Raises ApiError: the backend's refusal, or 502 where it is no count."""
    if exchange.status != 200:
        raise refusal_of(exchange, answer)
    response = parse_answer(answer)
    if not isinstance(response, dict) or whole_number(response.get("input_tokens")) is None:
        raise invalid("has no input_tokens")


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


def refusal_of(exchange: Exchange, answer: bytes) -> ApiError:
    """As `backend_error`; of an external provider with type, code and headers, where it is in OpenAI's shape."""
    refusal = backend_error(exchange.status, answer)
    if exchange.kind != "openai":
        return refusal
    try:
        body = loads_lenient(answer)
    except ValueError:
        return refusal
    error = body.get("error") if isinstance(body, dict) else None
    if refusal.status != exchange.status or not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return refusal
    kind, code = error.get("type"), error.get("code")
    headers = exchange.headers
    found: Headers = [
        (name.encode(), value.encode("latin-1"))
        for name in PASSED_HEADERS
        if (value := headers.get(name)) and len(value) <= MAX_WORD_CHARS and value.isascii() and value.isprintable()
    ]
    return ProviderError(
        refusal,
        kind[:MAX_WORD_CHARS] if isinstance(kind, str) else None,
        code[:MAX_WORD_CHARS] if isinstance(code, str) else code if isinstance(code, int) else None,
        found,
    )

"""Refusals and failures in OpenAI's error shape, so that any OpenAI client raises its own exception for them.

    400 not a call we can record                openai.BadRequestError
    401 no API key of this gateway              openai.AuthenticationError
    404 no such route, or model                 openai.NotFoundError
    403 asked from another site's page          openai.PermissionDeniedError
    405 another method                          openai.APIStatusError
    408 the body did not come                   openai.APIStatusError
    413 body over gateway.max_body_bytes        openai.APIStatusError
    422 ids that cannot be ids                  openai.UnprocessableEntityError
    429 a bound is reached                      openai.RateLimitError
    502 the backend's answer is no answer       openai.InternalServerError
    503 backend or broker away for too long,    openai.InternalServerError
        or the gateway stops
    504 the backend took too long               openai.InternalServerError

Within a stream, whose status was told long before: an event with the same body, for which its clients raise APIError.
Anthropic's clients get the same in their shape (protocols/messages.py).

`type` and `code` say whose failure it is: a program can tell ours from the model's. Knows nothing of HTTP servers.
"""

from __future__ import annotations

from typing import Any

import orjson

_INVALID = "invalid_request_error"

BACKEND_ERROR = "backend_error"
"""Code of what a backend refused, with its own status and message."""
BROKEN = "backend_broken"
"""Code of a backend's answer that has no end."""

Headers = list[tuple[bytes, bytes]]

RETRY_AFTER_SECONDS = 1
"""OpenAI clients honour it; what makes us say it (a swap, a full queue, a slow broker) is over within seconds."""


class ApiError(Exception):
    """An answer other than 200. `param` names the field at fault, where there is one."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.passed: Headers = []
        """Of a backend's refusal, its own headers, as far as the agent gets them."""

    def __str__(self) -> str:
        """For a log: without a backend's words, which may quote a prompt."""
        return f"{self.code} ({self.status})" if self.of_backend else self.message

    @property
    def of_backend(self) -> bool:
        """Whether a backend said it: its words, not ours."""
        return self.code == BACKEND_ERROR

    @property
    def reported(self) -> bool:
        """Whether a backend said within its answer that it failed."""
        return self.of_backend

    @property
    def retriable(self) -> bool:
        return self.status in (429, 503)

    def body(self) -> bytes:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else _INVALID
        return orjson.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def headers(self) -> Headers:
        if self.status == 408:
            return [(b"connection", b"close")]  # what still comes of the body is no request
        return [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())] if self.retriable else []


class ProviderError(ApiError):
    """What an external provider refused, with the type, code and headers that its clients act on.

    `code` is BACKEND_ERROR all the same: metrics and spans hold no words of others."""

    def __init__(self, refusal: ApiError, kind: str | None, code: str | int | None, headers: Headers) -> None:
        super().__init__(refusal.status, BACKEND_ERROR, refusal.message, param=refusal.param)
        self._kind = kind
        self._code = code
        self._headers = headers

    def body(self) -> bytes:
        error = {"message": self.message, "type": self._kind, "param": self.param, "code": self._code}
        return orjson.dumps({"error": error})

    def headers(self) -> Headers:
        return self._headers


class Aborted(ApiError):
    """A backend ended an answer before its end, and says so: vLLM does that to all requests when it is stopped, and
    paused without keeping them. It is no answer, however whole it looks."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__(502, BROKEN, "the backend aborted the answer before its end: it is being stopped, or paused")
        self.answer = answer
        """All of it, parsed, where it came whole."""

    @property
    def reported(self) -> bool:
        return True


class AgentGone(ApiError):
    """The agent hung up, or takes nothing of its answer: recorded, and told to nobody."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(499, code, message)


def interrupted() -> ApiError:
    """For a call that a stop of the gateway ends."""
    return ApiError(503, "interrupted", "the gateway stops, and the call was not over; ask again")

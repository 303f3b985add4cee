"""Refusals and failures in OpenAI's error shape, so that any OpenAI client raises its own exception for them.

    400 not a chat completion we can record     openai.BadRequestError
    404 no such route                           openai.NotFoundError
    405 another method                          openai.APIStatusError
    413 body over gateway.max_body_bytes        openai.APIStatusError
    422 ids that cannot be ids                  openai.UnprocessableEntityError
    429 gateway.max_concurrent_requests reached openai.RateLimitError
    502 the backend's answer is no answer       openai.InternalServerError
    503 backend or broker away for too long     openai.InternalServerError
    504 the backend took too long               openai.InternalServerError

`type` and `code` say whose failure it is: a program can tell ours from the model's. Knows nothing of HTTP servers.
"""

from __future__ import annotations

import orjson

_INVALID = "invalid_request_error"

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

    @property
    def retriable(self) -> bool:
        return self.status in (429, 503)

    def body(self) -> bytes:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else _INVALID
        return orjson.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def headers(self) -> Headers:
        return [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())] if self.retriable else []

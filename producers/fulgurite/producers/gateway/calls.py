"""One call of an agent, checked: ids, body, trace. Knows what may be asked, not who answers or where it is recorded.

A request that is refused here never becomes a call: nothing was asked of the policy, nothing is recorded.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import orjson

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import BackendKind
from fulgurite.producers.gateway.keys import parse_bearer
from fulgurite.producers.gateway.passing import headers_of_agent, query_of_agent
from fulgurite.producers.gateway.protocols.base import Api, loads, to_bytes
from fulgurite.schemas.ids import MAX_ID_CHARS, attempt_trace_id, new_span_id, new_trace_id, now_ns

HEADER_ROLLOUT = "x-rollout-id"
HEADER_ATTEMPT = "x-attempt-id"
HEADER_AGENT = "x-agent"
HEADER_TRACEPARENT = "traceparent"
HEADER_API_KEY = "x-api-key"
"""Where Anthropic's clients put what others send as a bearer token."""
HEADER_RETRY = "x-stainless-retry-count"
"""Sent by OpenAI's and Anthropic's clients: 0 at first, then how often they have asked the same again."""

MAX_AGENT_CHARS: Final = 512

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]*")
_RETRY = re.compile(r"[0-9]{1,6}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@dataclass(slots=True, frozen=True)
class Caller:
    """Who asks: what path and headers say, before anything of the body is read."""

    rollout_id: str
    """Empty, as attempt_id, for a call outside any rollout: recorded as a trace, never trained on."""
    attempt_id: str
    authorization: str
    """The token as it came, as a bearer token; never logged, never recorded."""
    key: str
    """The API key in it."""
    headers: Mapping[str, str]
    query: str
    """What of the request's head a backend may see, see passing.py."""


@dataclass(slots=True, frozen=True)
class Call:
    """What an agent asked of the model."""

    api: Api
    caller: Caller
    sequence_ids: tuple[int, ...]
    """One a choice."""
    trace_id: str
    parent_span_id: str
    span_ids: tuple[str, ...]
    """One a choice."""
    agent: str
    retry_count: int
    """How often the agent's client had asked this before, as far as it says so."""
    start_ns: int
    began: float
    """The same instant, of the clock that never jumps."""
    body: dict[str, Any]
    """As the agent sent it."""
    agent_body: bytes
    """The same, byte for byte."""
    policy_body: bytes
    """What the policy's server is asked."""

    @property
    def rollout_id(self) -> str:
        return self.caller.rollout_id

    @property
    def attempt_id(self) -> str:
        return self.caller.attempt_id

    @property
    def choices(self) -> int:
        return len(self.span_ids)

    @property
    def model(self) -> str:
        return str(self.body.get("model") or "")

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    def seconds(self) -> float:
        """Since the agent asked."""
        return time.perf_counter() - self.began

    def body_for(self, kind: BackendKind) -> bytes:
        if kind == "vllm":
            return self.policy_body
        asked = self.api.for_provider(self.body) if self.streamed else None
        return self.agent_body if asked is None else to_bytes(asked)

    def unchanged_for(self, kind: BackendKind) -> bytes:
        """The same for a provider that refused what was added to it."""
        return self.policy_body if kind == "vllm" else self.agent_body


class Sequences:
    """Gives the calls of an attempt rising sequence ids: milliseconds since the epoch, one more where that is taken.

    A plain count would begin at 1 again after a restart or in a second gateway, and sort the later half of an attempt
    into the earlier. So the order holds across restarts, and across gateways as far as their clocks agree. Bounded: the
    attempt silent for longest is forgotten first.
    """

    def __init__(self, max_attempts: int = 100_000) -> None:
        self._last: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._max_attempts = max_attempts

    def take(self, rollout_id: str, attempt_id: str, count: int, now_ns: int) -> tuple[int, ...]:
        """The next `count` ids; zeros for a call outside any rollout."""
        if not rollout_id:
            return (0,) * count
        key = (rollout_id, attempt_id)
        first = max(self._last.pop(key, 0) + 1, now_ns // 1_000_000)
        self._last[key] = first + count - 1
        if len(self._last) > self._max_attempts:
            self._last.popitem(last=False)
        return tuple(range(first, first + count))


def identify(path_ids: Mapping[str, str], headers: Mapping[str, str], query: bytes = b"") -> Caller:
    """The caller. Ids are taken from the path, else from headers, else from the token. Raises ApiError(422)."""
    authorization = headers.get("authorization", "")
    if not authorization and (token := headers.get(HEADER_API_KEY)):
        authorization = f"Bearer {token}"
    bearer = parse_bearer(authorization)
    rollout_id = path_ids.get("rollout_id") or headers.get(HEADER_ROLLOUT) or ""
    attempt_id = path_ids.get("attempt_id") or headers.get(HEADER_ATTEMPT) or ""
    if not rollout_id and not attempt_id:
        rollout_id, attempt_id = bearer.rollout_id, bearer.attempt_id
    _check_ids(rollout_id, attempt_id)
    return Caller(rollout_id, attempt_id, authorization, bearer.key, headers_of_agent(headers), query_of_agent(query))


def parse_call(api: Api, caller: Caller, headers: Mapping[str, str], body: bytes, sequences: Sequences) -> Call:
    """The call. Raises ApiError(400) for the body."""
    start_ns = now_ns()
    request = _request(body)
    stream = request.get("stream")
    if stream is not None and stream is not True and stream is not False:
        raise ApiError(400, "invalid_stream", "stream must be true or false", param="stream")
    count = api.choices(request)
    policy_body = _policy_body(api, request, body)
    trace_id, parent_span_id = _trace(headers, caller.rollout_id, caller.attempt_id)
    return Call(
        api=api,
        caller=caller,
        sequence_ids=sequences.take(caller.rollout_id, caller.attempt_id, count, start_ns),
        trace_id=trace_id,
        parent_span_id=parent_span_id,
        span_ids=tuple(new_span_id() for _ in range(count)),
        agent=headers.get(HEADER_AGENT, "")[:MAX_AGENT_CHARS],
        retry_count=_retry_count(headers),
        start_ns=start_ns,
        began=time.perf_counter(),
        body=request,
        agent_body=body,
        policy_body=policy_body,
    )


def model_of(body: bytes) -> str:
    """Which model a body names. Raises ApiError(400) for what is no request."""
    return str(_request(body).get("model") or "")


def _check_ids(rollout_id: str, attempt_id: str) -> None:
    if bool(rollout_id) != bool(attempt_id):
        missing = "attempt_id" if rollout_id else "rollout_id"
        raise ApiError(422, "missing_id", f"rollout_id and attempt_id go together: {missing} is missing", param=missing)
    for name, value in (("rollout_id", rollout_id), ("attempt_id", attempt_id)):
        if value and (len(value) > MAX_ID_CHARS or not _ID.fullmatch(value)):
            message = (
                f"{name} must be 1 to {MAX_ID_CHARS} of A-Z a-z 0-9 . _ : @ = + - and begin with a letter or digit"
            )
            raise ApiError(422, "invalid_id", message, param=name)


def _request(body: bytes) -> dict[str, Any]:
    try:
        request = loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ApiError(400, "invalid_body", "the body must be a JSON object")
    if not isinstance(request.get("model", ""), str | None):
        raise ApiError(400, "invalid_model", "model must be a string", param="model")
    return request


def _policy_body(api: Api, request: dict[str, Any], body: bytes) -> bytes:
    asked = api.for_policy(request)
    if asked == request:
        return body
    try:
        return orjson.dumps(asked)
    except orjson.JSONEncodeError as error:
        if "64-bit" in str(error):  # a long number, not nesting without end
            with suppress(RecursionError):
                return to_bytes(asked)
        raise ApiError(400, "invalid_json", f"the body cannot be handed on: {error}") from None


def _retry_count(headers: Mapping[str, str]) -> int:
    """0 for a client that does not count."""
    said = headers.get(HEADER_RETRY, "")
    return int(said) if _RETRY.fullmatch(said) else 0


def _trace(headers: Mapping[str, str], rollout_id: str, attempt_id: str) -> tuple[str, str]:
    """(trace_id, parent_span_id): the agent's own trace where it has one, else the attempt's."""
    match = _TRACEPARENT.fullmatch(headers.get(HEADER_TRACEPARENT, ""))
    if match and not match[0].startswith("ff"):
        return match[1], match[2]
    return (attempt_trace_id(rollout_id, attempt_id) if rollout_id else new_trace_id()), ""

"""One call of an agent, checked: ids, body, trace. Knows what may be asked, not who answers or where it is recorded.

A request that is refused here never becomes a call: nothing was asked of the policy, nothing is recorded.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.schemas.ids import MAX_ID_CHARS, attempt_trace_id, new_span_id, new_trace_id, now_ns

HEADER_ROLLOUT = "x-rollout-id"
HEADER_ATTEMPT = "x-attempt-id"
HEADER_AGENT = "x-agent"
HEADER_TRACEPARENT = "traceparent"
HEADER_RETRY = "x-stainless-retry-count"
"""Sent by OpenAI's clients: 0 at first, then how often they have asked the same again."""

MAX_CHOICES: Final = 128
"""Of one call (`n`), as OpenAI bounds it."""

MAX_AGENT_CHARS: Final = 512

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]*")
_RETRY = re.compile(r"[0-9]{1,6}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@dataclass(slots=True, frozen=True)
class Call:
    """A chat completion that an agent asked for."""

    rollout_id: str
    """Empty, as attempt_id, for a call outside any rollout: recorded as a trace, never trained on."""
    attempt_id: str
    sequence_ids: tuple[int, ...]
    """One a choice."""
    trace_id: str
    parent_span_id: str
    span_ids: tuple[str, ...]
    """One a choice."""
    agent: str
    retry_count: int
    """How often the agent's client had asked this before, as far as it says so."""
    authorization: str
    """Handed on to the backend as it came; never logged, never recorded."""
    start_ns: int
    body: dict[str, Any]
    """As the agent sent it."""
    backend_body: bytes
    """What the backend is asked."""

    @property
    def choices(self) -> int:
        return len(self.span_ids)

    @property
    def model(self) -> str:
        return str(self.body.get("model") or "")

    def asked_for(self, field: str) -> bool:
        return bool(self.body.get(field))


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


def parse_call(path_ids: Mapping[str, str], headers: Mapping[str, str], body: bytes, sequences: Sequences) -> Call:
    """The call. Raises ApiError: 400 for the body, 422 for ids."""
    start_ns = now_ns()
    rollout_id, attempt_id = _ids(path_ids, headers)
    request = _request(body)
    count = _choices(request)
    backend_body = _backend_body(request)
    trace_id, parent_span_id = _trace(headers, rollout_id, attempt_id)
    return Call(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_ids=sequences.take(rollout_id, attempt_id, count, start_ns),
        trace_id=trace_id,
        parent_span_id=parent_span_id,
        span_ids=tuple(new_span_id() for _ in range(count)),
        agent=headers.get(HEADER_AGENT, "")[:MAX_AGENT_CHARS],
        retry_count=_retry_count(headers),
        authorization=headers.get("authorization", ""),
        start_ns=start_ns,
        body=request,
        backend_body=backend_body,
    )


def _ids(path_ids: Mapping[str, str], headers: Mapping[str, str]) -> tuple[str, str]:
    rollout_id = path_ids.get("rollout_id") or headers.get(HEADER_ROLLOUT, "")
    attempt_id = path_ids.get("attempt_id") or headers.get(HEADER_ATTEMPT, "")
    if bool(rollout_id) != bool(attempt_id):
        missing = "attempt_id" if rollout_id else "rollout_id"
        raise ApiError(422, "missing_id", f"rollout_id and attempt_id go together: {missing} is missing", param=missing)
    for name, value in (("rollout_id", rollout_id), ("attempt_id", attempt_id)):
        if value and (len(value) > MAX_ID_CHARS or not _ID.fullmatch(value)):
            message = (
                f"{name} must be 1 to {MAX_ID_CHARS} of A-Z a-z 0-9 . _ : @ = + - and begin with a letter or digit"
            )
            raise ApiError(422, "invalid_id", message, param=name)
    return rollout_id, attempt_id


def _request(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ApiError(400, "invalid_body", "the body must be a JSON object")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "invalid_messages", "messages must be a list with at least one message", param="messages")
    if request.get("stream"):
        message = "this gateway does not stream: leave `stream` out or set it to false"
        raise ApiError(400, "stream_unsupported", message, param="stream")
    if not isinstance(request.get("model", ""), str | None):
        raise ApiError(400, "invalid_model", "model must be a string", param="model")
    return request


def _backend_body(request: dict[str, Any]) -> bytes:
    """The agent's request and the fields that make its answer recordable.

    Without `seed`: it makes samples of a group alike, and vLLM's CPU engine dies of it (chunked prefill).
    """
    asked = {name: value for name, value in request.items() if name != "seed"}
    asked |= {"logprobs": True, "return_token_ids": True, "return_weight_versions": True}
    try:
        return orjson.dumps(asked)
    except orjson.JSONEncodeError as error:
        raise ApiError(400, "invalid_json", f"the body cannot be handed on: {error}") from None


def _choices(request: dict[str, Any]) -> int:
    count = request.get("n")
    if count is None:
        return 1
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_CHOICES:
        raise ApiError(400, "invalid_n", f"n must be a whole number from 1 to {MAX_CHOICES}", param="n")
    return count


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

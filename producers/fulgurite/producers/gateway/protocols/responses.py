"""POST /v1/responses: OpenAI's Responses API, on the backend's own route.

vLLM 0.32 gives token ids there when asked for `enable_response_messages` (input_messages and output_messages, each with
its `tokens`), and logprobs when `include` names them: of all tokens beside the text of a whole answer, of each delta's
beside the delta in a stream. Where their counts agree, the call is recorded like any other. Where they do not (in a
stream, tokens that make no text have none: a tool call, half a character), its ids are recorded without logprobs, and
it is not trained on. Of an answer that it aborts, vLLM says `cancelled` where it is a gpt-oss's, and `completed` of all
others: of those, only what has no token can be told from an answer. Answers that the server keeps (`background`) are
not served: they would be fetched past the recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Final

import orjson

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.errors import Aborted, ApiError
from fulgurite.producers.gateway.outcome import Choice, Outcome
from fulgurite.producers.gateway.protocols.base import (
    NOTHING,
    Api,
    Json,
    Stream,
    invalid,
    parse_data,
    picked,
    reported,
    to_bytes,
    unfinished,
    whole_number,
    whole_text,
    without_seed,
)

LOGPROBS: Final = "message.output_text.logprobs"
_ENDS: Final = frozenset({"response.completed", "response.incomplete"})
_CANCELLED: Final = "cancelled"
_CALLS: Final = frozenset({"function_call", "custom_tool_call", "mcp_call"})
"""Types of items that call a tool."""


class ResponsesApi(Api):
    route: ClassVar[str] = "/v1/responses"

    def gives_ids(self, body: Json) -> bool:
        return False

    def choices(self, body: Json) -> int:
        if not isinstance(body.get("input"), str | list):
            raise ApiError(400, "invalid_input", "input must be a text or a list", param="input")
        if body.get("background"):
            message = "answers in the background are not served: they could not be recorded"
            raise ApiError(400, "background_unsupported", message, param="background")
        return 1

    def for_policy(self, body: Json) -> Json:
        asked = without_seed(body) | {"enable_response_messages": True}
        included = body.get("include")
        if included is None or (isinstance(included, list) and LOGPROBS not in included):
            asked["include"] = [*(included or ()), LOGPROBS]
        return asked

    def input_of(self, body: Json, index: int) -> str:
        return picked(body, "instructions", "input", "previous_response_id")

    def read(self, body: Json, response: Any) -> Outcome:
        if not isinstance(response, dict) or not isinstance(response.get("output"), list):
            raise invalid("has no output")
        if response.get("error"):
            raise reported(response["error"])
        outcome = Outcome()
        _read_response(outcome, response)
        return outcome

    def seems_aborted(self, answer: bytes) -> bool:
        return b'"cancelled"' in answer or NOTHING.search(answer) is not None

    def is_aborted(self, response: Any, *, ours: bool) -> bool:
        return isinstance(response, dict) and _is_aborted(response, ours=ours)

    def strip(self, body: Json, response: Any) -> None:
        _strip_response(response, logprobs=_wants_logprobs(body), messages=bool(body.get("enable_response_messages")))

    def stream(self, body: Json, *, strip: bool) -> Stream:
        return _ResponsesStream(body, strip=strip)

    def error_event(self, error: ApiError) -> bytes:
        # `error` is what OpenAI's clients raise for; the rest is the event of the protocol.
        event = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return sse.event(orjson.dumps(event | orjson.loads(error.body())), "error")


class _ResponsesStream(Stream):
    def __init__(self, body: Json, *, strip: bool) -> None:
        super().__init__()
        self._strip = strip
        self._logprobs_wanted = _wants_logprobs(body)
        self._messages_wanted = bool(body.get("enable_response_messages"))
        self._texts: list[str] = []
        self._logprobs: list[float] = []

    @property
    def complete(self) -> bool:
        return self.ended

    def feed(self, event: sse.Event) -> tuple[bytes, bytes]:
        if not event.data or event.data == b"[DONE]":
            return (b"", event.raw) if self.ended else (event.raw, b"")
        data = parse_data(event)
        kind = str(data.get("type") or "")
        response = data.get("response")
        if kind == "error" or data.get("error"):
            raise reported(data.get("error") or data)
        if kind == "response.failed":
            raise reported(response.get("error") if isinstance(response, dict) else None)
        if kind == "response.output_text.delta":
            self._texts.append(str(data.get("delta") or ""))
            self._logprobs += _token_logprobs(data.get("logprobs"))
        if not self.speaks:
            item = data.get("item")
            calls = isinstance(item, dict) and item.get("type") in _CALLS
            self.speaks = calls or (kind.endswith(".delta") and bool(data.get("delta")))
        if isinstance(response, dict):
            self._read(response, final=kind in _ENDS)
        self.ended = self.ended or kind in _ENDS
        raw = self._stripped(kind, data) if self._strip else event.raw
        return (b"", raw) if self.ended else (raw, b"")

    def _read(self, response: Json, *, final: bool) -> None:
        if final:
            if not isinstance(response.get("output"), list):
                raise invalid("has no output")
            _read_response(self.outcome, response, self._logprobs)
            if _is_aborted(response, ours=self._strip):
                raise Aborted
            self.speaks = self.speaks or bool(response["output"])
        else:
            self.outcome.response_id = str(response.get("id") or "")
            self.outcome.model = str(response.get("model") or "")

    def _stripped(self, kind: str, data: Json) -> bytes:
        if isinstance(data.get("response"), dict):
            _strip_response(data["response"], logprobs=self._logprobs_wanted, messages=self._messages_wanted)
        if not self._logprobs_wanted:
            if "logprobs" in data:
                data["logprobs"] = []
            for part in _parts(data.get("part"), data.get("item")):
                part["logprobs"] = None
        return sse.event(to_bytes(data), kind)

    def close(self) -> None:
        if not self.ended:
            self.outcome.choice(0).output = whole_text(self._texts)


def _is_aborted(response: Json, *, ours: bool) -> bool:
    usage = response.get("usage")
    has_nothing = isinstance(usage, dict) and usage.get("output_tokens") == 0
    return response.get("status") == _CANCELLED or (ours and has_nothing)


def _wants_logprobs(body: Json) -> bool:
    included = body.get("include")
    return isinstance(included, list) and LOGPROBS in included


def _read_response(outcome: Outcome, response: Json, streamed_logprobs: list[float] | None = None) -> None:
    outcome.response_id = str(response.get("id") or "")
    outcome.model = str(response.get("model") or "")
    usage = response.get("usage")
    if isinstance(usage, dict):
        outcome.input_tokens = whole_number(usage.get("input_tokens"))
        outcome.output_tokens = whole_number(usage.get("output_tokens"))
    reason = _finish_reason(response)
    choice = Choice(output=response["output"], finish_reason=reason, failed=unfinished(reason))
    prompt, sampled = _tokens(response.get("input_messages")), _tokens(response.get("output_messages"))
    # More than one entry is a server that ran tools between several answers: what was sampled is not told apart.
    if len(prompt) == len(sampled) == 1:
        choice.prompt_ids, choice.token_ids = prompt[0], sampled[0]
        found = streamed_logprobs or [
            logprob for part in _parts(*response["output"]) for logprob in _token_logprobs(part.get("logprobs"))
        ]
        if len(found) == len(choice.token_ids):
            choice.logprobs = found
    outcome.choices[0] = choice


def _finish_reason(response: Json) -> str:
    """In the words of chat completions, where there are any: the same end has one name in the tables."""
    if response.get("status") == "completed":
        called = any(isinstance(item, dict) and item.get("type") == "function_call" for item in response["output"])
        return "tool_calls" if called else "stop"
    details = response.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else None
    return "length" if reason == "max_output_tokens" else str(reason or response.get("status") or "")


def _tokens(messages: Any) -> list[list[int]]:
    found = [message.get("tokens") for message in _list(messages) if isinstance(message, dict)]
    return [tokens for tokens in found if isinstance(tokens, list)]


def _token_logprobs(given: Any) -> list[float]:
    return [token["logprob"] for token in _list(given) if isinstance(token, dict) and "logprob" in token]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _parts(*items: Any) -> Iterator[Json]:
    """The parts that hold text, of output items or of parts themselves."""
    for item in items:
        if isinstance(item, dict):
            if item.get("type") == "output_text":
                yield item
            content = item.get("content")
            yield from (
                part
                for part in (content if isinstance(content, list) else ())
                if isinstance(part, dict) and part.get("type") == "output_text"
            )


def _strip_response(response: Json, *, logprobs: bool, messages: bool) -> None:
    if not messages:
        for name in ("input_messages", "output_messages"):
            if name in response:
                response[name] = None
    if not logprobs:
        output = response.get("output")
        for part in _parts(*(output if isinstance(output, list) else ())):
            part["logprobs"] = None

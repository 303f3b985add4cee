"""POST /v1/messages: Anthropic's messages, on the backend's own route.

vLLM 0.32 takes no field for token ids or logprobs there and gives none: calls are recorded by their texts, usage and
stop reason, and are not trained on. What the agent asked passes unchanged, and so does the answer. An answer that it
aborts has no stop reason there; none of its tokens either, where it calls itself at an end all the same.
"""

from __future__ import annotations

import re
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
    loads,
    parse_data,
    picked,
    reported,
    unfinished,
    whole_number,
    whole_text,
    without_seed,
)

_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_STOP_REASON: Final = re.compile(rb'"stop_reason"\s*:\s*"')
_PIECES: Final = {
    "text_delta": "text",
    "input_json_delta": "partial_json",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
}
"""Type of a delta -> its field, which is appended to the block's."""


class MessagesApi(Api):
    route: ClassVar[str] = "/v1/messages"
    passes: ClassVar[bool] = True

    def gives_ids(self, body: Json) -> bool:
        return False

    def choices(self, body: Json) -> int:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            message = "messages must be a list with at least one message"
            raise ApiError(400, "invalid_messages", message, param="messages")
        return 1

    def for_policy(self, body: Json) -> Json:
        return without_seed(body)

    def input_of(self, body: Json, index: int) -> str:
        return picked(body, "system", "messages")

    def read(self, body: Json, response: Any) -> Outcome:
        if not isinstance(response, dict) or not isinstance(response.get("content"), list):
            raise invalid("has no content")
        outcome = Outcome()
        _read_message(outcome, response)
        reason = str(response.get("stop_reason") or "")
        outcome.choices[0] = Choice(
            output={"role": response.get("role") or "assistant", "content": response["content"]},
            finish_reason=reason,
            failed=unfinished(reason),
        )
        return outcome

    def seems_aborted(self, answer: bytes) -> bool:
        return not _STOP_REASON.search(answer) or NOTHING.search(answer) is not None

    def is_aborted(self, response: Any, *, ours: bool) -> bool:
        if not ours or not isinstance(response, dict):
            return False
        if not isinstance(response.get("content"), list):
            return False
        return not response.get("stop_reason") or _says_nothing(response.get("usage"))

    def strip(self, body: Json, response: Any) -> None:
        """Nothing was asked that the agent did not."""

    def stream(self, body: Json, *, strip: bool) -> Stream:
        return _MessagesStream(ours=strip)

    def error_body(self, error: ApiError) -> bytes:
        kind = _ERROR_TYPES.get(error.status, "api_error")
        inner = {"type": kind, "message": error.message, "code": error.code, "param": error.param}
        return orjson.dumps({"type": "error", "error": inner})

    def error_event(self, error: ApiError) -> bytes:
        return sse.event(self.error_body(error), "error")


class _MessagesStream(Stream):
    def __init__(self, *, ours: bool) -> None:
        super().__init__()
        self._ours = ours
        self._blocks: dict[int, Json] = {}
        self._pieces: dict[tuple[int, str], list[str]] = {}
        self._citations: dict[int, list[Any]] = {}
        self._stopping = False

    @property
    def complete(self) -> bool:
        # A provider's last event ends what has come, also without a stop reason: the record says that there is none.
        return self._stopping or (self.ended and not self._ours and bool(self.outcome.choices))

    def feed(self, event: sse.Event) -> tuple[bytes, bytes]:
        if not event.data:
            return event.raw, b""
        data = parse_data(event)
        match data.get("type"):
            case "message_start":
                _read_message(self.outcome, data.get("message"))
                self.outcome.choice(0)
            case "content_block_start" if isinstance(data.get("content_block"), dict):
                block = self._blocks[_index(data)] = data["content_block"]
                self.speaks = self.speaks or block.get("type") == "tool_use" or bool(block.get("text"))
            case "content_block_delta" if isinstance(data.get("delta"), dict):
                delta = data["delta"]
                if name := _PIECES.get(str(delta.get("type"))):
                    self._pieces.setdefault((_index(data), name), []).append(str(delta.get(name) or ""))
                    self.speaks = self.speaks or bool(delta.get(name))
                elif delta.get("type") == "citations_delta":
                    self._citations.setdefault(_index(data), []).append(delta.get("citation"))
            case "message_delta":
                _read_usage(self.outcome, data.get("usage"))
                if self._ours and _says_nothing(data.get("usage")):
                    raise Aborted
                delta = data.get("delta")
                reason = delta.get("stop_reason") if isinstance(delta, dict) else None
                if reason:
                    choice = self.outcome.choice(0)
                    choice.finish_reason, choice.failed = str(reason), unfinished(str(reason))
                    self._stopping = True
            case "message_stop":
                self.ended = True
                for choice in self.outcome.choices.values():
                    choice.failed = choice.failed or unfinished(choice.finish_reason)
            case "error":
                raise reported(data.get("error"))
            case _:
                pass
        return (b"", event.raw) if self._stopping or self.ended else (event.raw, b"")

    def close(self) -> None:
        content: list[Json] = []
        for index, block in sorted(self._blocks.items()):
            texts = {name: whole_text(texts) for (at, name), texts in self._pieces.items() if at == index}
            arguments = texts.pop("partial_json", "")
            cited = self._citations.get(index)
            content.append(
                block
                | texts
                | ({"input": _arguments(arguments)} if arguments else {})
                | ({"citations": cited} if cited else {})
            )
        self.outcome.choice(0).output = {"role": "assistant", "content": content}


def _arguments(text: str) -> Any:
    """Of a tool, as an object; as the text itself where it is cut off or is none."""
    try:
        return loads(text.encode())
    except ValueError:
        return text


def _index(data: Json) -> int:
    index = data.get("index")
    if not isinstance(index, int):
        raise invalid("has a content block without index")
    return index


def _says_nothing(usage: Any) -> bool:
    return isinstance(usage, dict) and usage.get("output_tokens") == 0


def _read_message(outcome: Outcome, message: Any) -> None:
    if not isinstance(message, dict):
        raise invalid("has an event message_start without a message")
    outcome.response_id = str(message.get("id") or "")
    outcome.model = str(message.get("model") or "")
    _read_usage(outcome, message.get("usage"))


def _read_usage(outcome: Outcome, usage: Any) -> None:
    """Of a stream, the last that is given counts."""
    if isinstance(usage, dict):
        read, written = whole_number(usage.get("input_tokens")), whole_number(usage.get("output_tokens"))
        outcome.input_tokens = read if read is not None else outcome.input_tokens
        outcome.output_tokens = written if written is not None else outcome.output_tokens

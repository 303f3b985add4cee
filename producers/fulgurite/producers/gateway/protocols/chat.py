"""POST /v1/chat/completions: OpenAI's chat completions, with vLLM's token ids and logprobs."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols.base import Json, Stream, to_json, whole_text
from fulgurite.producers.gateway.protocols.choices import ChoicesApi, ChoicesStream, number_of_choices

_ONCE: Final = frozenset({"role", "id", "type", "index", "name"})
"""Fields of a delta that come whole; other texts come in pieces."""


class ChatApi(ChoicesApi):
    route: ClassVar[str] = "/v1/chat/completions"
    logprobs_asked: ClassVar[Any] = True

    def choices(self, body: Json) -> int:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            message = "messages must be a list with at least one message"
            raise ApiError(400, "invalid_messages", message, param="messages")
        return number_of_choices(body)

    def input_of(self, body: Json, index: int) -> str:
        return to_json(body["messages"])

    def logprobs(self, body: Json, choice: Json) -> list[float] | None:
        given = choice.get("logprobs")
        content = given.get("content") if isinstance(given, dict) else None
        if content is None:
            return None
        try:
            return [token["logprob"] for token in content]
        except (TypeError, KeyError):
            return None

    def output(self, choice: Json) -> Any:
        return choice.get("message")

    def stream(self, body: Json, *, strip: bool) -> Stream:
        return _ChatStream(self, body, number_of_choices(body), strip=strip)


class _ChatStream(ChoicesStream):
    def __init__(self, api: ChatApi, body: Json, count: int, *, strip: bool) -> None:
        super().__init__(api, body, count, strip=strip)
        self._messages: dict[int, _Pieces] = {}

    def fold_text(self, index: int, given: Json) -> None:
        delta = given.get("delta")
        if isinstance(delta, dict) and delta:
            message = self._messages.get(index)
            if message is None:
                message = self._messages[index] = _Pieces()
            message.add(delta)

    def says_something(self, choice: Json) -> bool:
        delta = choice.get("delta")
        return isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role")

    def says_nothing(self, choice: Json) -> bool:
        return not choice.get("delta")

    def close(self) -> None:
        for index, message in self._messages.items():
            self.outcome.choice(index).output = message.joined()


class _Pieces:
    """A message, or a tool call of one, that arrives in deltas. Texts are joined once, at the end."""

    def __init__(self) -> None:
        self._whole: Json = {}
        self._texts: dict[str, list[str]] = {}
        self._objects: dict[str, _Pieces] = {}
        self._lists: dict[str, dict[int, _Pieces]] = {}

    def add(self, delta: Json) -> None:
        for name, value in delta.items():
            if isinstance(value, str) and name not in _ONCE:
                self._texts.setdefault(name, []).append(value)
            elif name == "tool_calls" and isinstance(value, list):
                calls = self._lists.setdefault(name, {})
                for position, call in enumerate(value):
                    if isinstance(call, dict):
                        index = call.get("index")
                        calls.setdefault(index if isinstance(index, int) else position, _Pieces()).add(call)
            elif isinstance(value, dict):
                self._objects.setdefault(name, _Pieces()).add(value)
            elif value is not None:
                self._whole[name] = value

    def joined(self) -> Json:
        found = {name: value for name, value in self._whole.items() if name != "index"}
        found |= {name: whole_text(texts) for name, texts in self._texts.items()}
        found |= {name: pieces.joined() for name, pieces in self._objects.items()}
        return found | {name: [calls[at].joined() for at in sorted(calls)] for name, calls in self._lists.items()}

"""POST /v1/completions: a prompt as text or token ids goes on; a list of prompts is a call with that many answers."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols.base import Json, Stream, to_json
from fulgurite.producers.gateway.protocols.choices import ChoicesApi, ChoicesStream, number_of_choices

MAX_ANSWERS: Final = 1_024
"""Of one call: prompts times `n`. Each is a span."""


class CompletionsApi(ChoicesApi):
    route: ClassVar[str] = "/v1/completions"
    operation: ClassVar[str] = "text_completion"
    logprobs_asked: ClassVar[Any] = 0
    """How many alternatives; the sampled token's own comes with none."""

    def choices(self, body: Json) -> int:
        prompts = _prompts(body)
        if not prompts:
            message = "prompt must be a text, a list of token ids, or a list of at least one of these"
            raise ApiError(400, "invalid_prompt", message, param="prompt")
        count = len(prompts) * number_of_choices(body)
        if count > MAX_ANSWERS:
            raise ApiError(400, "invalid_prompt", f"{count} answers; at most {MAX_ANSWERS} a call", param="prompt")
        return count

    def wants_logprobs(self, body: Json) -> bool:
        return body.get("logprobs") is not None

    def input_of(self, body: Json, index: int) -> str:
        prompt = _prompts(body)[index // number_of_choices(body)]
        return prompt if isinstance(prompt, str) else to_json(prompt)

    def first_with_input(self, body: Json, index: int) -> int:
        return index - index % number_of_choices(body)

    def logprobs(self, body: Json, choice: Json) -> list[float] | None:
        given = choice.get("logprobs")
        found = given.get("token_logprobs") if isinstance(given, dict) else None
        if not isinstance(found, list):
            return None
        ids = choice.get("token_ids")
        if body.get("echo") and isinstance(ids, list):
            return found[len(found) - len(ids) :] if len(found) >= len(ids) else found  # the prompt's come first
        return found

    def output(self, choice: Json) -> Any:
        return choice.get("text")

    def stream(self, body: Json, *, strip: bool) -> Stream:
        return _CompletionsStream(self, body, self.choices(body), strip=strip)


class _CompletionsStream(ChoicesStream):
    def __init__(self, api: CompletionsApi, body: Json, count: int, *, strip: bool) -> None:
        super().__init__(api, body, count, strip=strip)
        self._texts: dict[int, list[str]] = {}

    def fold_text(self, index: int, given: Json) -> None:
        if isinstance(text := given.get("text"), str):
            self._texts.setdefault(index, []).append(text)

    def says_something(self, choice: Json) -> bool:
        return bool(choice.get("text"))

    def says_nothing(self, choice: Json) -> bool:
        return False

    def close(self) -> None:
        for index, texts in self._texts.items():
            self.outcome.choice(index).output = "".join(texts)


def _prompts(body: Json) -> list[Any]:
    """Each a text or a list of token ids; empty for what is no prompt."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return []
    return [prompt] if isinstance(prompt[0], int) else prompt if isinstance(prompt[0], str | list) else []

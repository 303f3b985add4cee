"""POST /v1/completions: a prompt as text or token ids goes on; a list of prompts is a call with that many answers.

With `echo` the prompt stands before the answer, its logprobs before the answer's. vLLM leaves its text out for who asks
for token ids: it is put back where it is known, and ids are not asked for where only vLLM knows it. With `max_tokens` 0
as well, vLLM samples a token that it shows nobody the logprob of: no answer, and none is recorded.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.outcome import Outcome
from fulgurite.producers.gateway.protocols.base import Json, Stream, to_json, whole_text
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

    def gives_ids(self, body: Json) -> bool:
        if not body.get("echo") or body.get("return_token_ids"):
            return True
        return all(isinstance(prompt, str) for prompt in _prompts(body))

    def for_policy(self, body: Json) -> Json:
        asked = super().for_policy(body)
        if not self.gives_ids(body):
            for name in ("return_token_ids", "logprobs"):
                del asked[name]
                if name in body:
                    asked[name] = body[name]
        return asked

    def strip_choice(self, body: Json, choice: Json) -> None:
        # In a stream it is the first chunk of a choice that has the prompt.
        if body.get("echo") and not body.get("return_token_ids") and choice.get("prompt_token_ids") is not None:
            prompt = _prompts(body)[choice.get("index", 0) // number_of_choices(body)]
            choice["text"] = prompt + choice["text"]
        if "prompt_logprobs" in choice and body.get("prompt_logprobs") is None and not self.wants_logprobs(body):
            choice["prompt_logprobs"] = None  # an echo has them where logprobs are asked for: we did
        super().strip_choice(body, choice)

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
        ids, prompt_ids = choice.get("token_ids"), choice.get("prompt_token_ids")
        if not body.get("echo") or not isinstance(ids, list) or not isinstance(prompt_ids, list):
            return found
        # The prompt's come first: in a stream with the first chunk, which has its ids.
        return found[len(prompt_ids) :] if len(found) == len(prompt_ids) + len(ids) else None

    def read(self, body: Json, response: Any) -> Outcome:
        outcome = super().read(body, response)
        if samples_nothing(body):
            leave_out_tokens(outcome)
        return outcome

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
            self.outcome.choice(index).output = whole_text(texts)
        if samples_nothing(self._body):
            leave_out_tokens(self.outcome)


def samples_nothing(body: Json) -> bool:
    """Whether only the prompt is asked back, with its logprobs."""
    return bool(body.get("echo")) and body.get("max_tokens") == 0


def leave_out_tokens(outcome: Outcome) -> None:
    """What was sampled though nobody asked for it, and is counted by vLLM."""
    for choice in outcome.choices.values():
        if choice.token_ids is not None:
            choice.token_ids, choice.logprobs, choice.versions = [], [], None
            outcome.output_tokens = 0


def _prompts(body: Json) -> list[Any]:
    """Each a text or a list of token ids; empty for what is no prompt."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return []
    return [prompt] if isinstance(prompt[0], int) else prompt if isinstance(prompt[0], str | list) else []

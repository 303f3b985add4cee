"""What chat completions and completions have in common: answers as `choices`, streams that end with [DONE].

A stream's event that finishes a choice, and whatever of that choice or of the whole answer comes after it, waits until
the call is recorded; other choices go on meanwhile.

An external provider's [DONE] ends an answer of whatever came: some give one choice whatever `n` is, or no finish
reason, and their clients are content with that. What is missing is so in the record. Of the policy's server it would be
a failure, for it says of each choice how it ended; so it is of a connection that closes without [DONE].
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Final

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.errors import Aborted, ApiError
from fulgurite.producers.gateway.outcome import Choice, Outcome
from fulgurite.producers.gateway.protocols.base import (
    ABORTED,
    MAX_CHOICES,
    Api,
    Json,
    Stream,
    invalid,
    parse_data,
    reported,
    to_bytes,
    unfinished,
    whole_number,
    without_seed,
)

DONE: Final = b"[DONE]"


class ChoicesApi(Api):
    logprobs_asked: ClassVar[Any]
    """What `logprobs` must at least be for one logprob a token."""

    def gives_ids(self, body: Json) -> bool:
        return True

    def for_policy(self, body: Json) -> Json:
        asked = without_seed(body)
        asked |= {"return_token_ids": True, "return_weight_versions": True}
        if not self.wants_logprobs(body):
            asked["logprobs"] = self.logprobs_asked
        if body.get("stream"):
            # The count of tokens shows whether all of them came.
            asked["stream_options"] = body["stream_options"] if wants_usage(body) else {"include_usage": True}
        return asked

    def for_provider(self, body: Json) -> Json | None:
        """With the count of tokens at the end of a stream: budgets are of tokens."""
        options = body.get("stream_options") or {}
        if not body.get("stream") or wants_usage(body) or not isinstance(options, dict):
            return None
        return body | {"stream_options": options | {"include_usage": True}}

    def wants_logprobs(self, body: Json) -> bool:
        return bool(body.get("logprobs"))

    def read(self, body: Json, response: Any) -> Outcome:
        choices = response.get("choices") if isinstance(response, dict) else None
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise invalid("has no choices")
        outcome = Outcome()
        read_header(outcome, response)
        prompt_ids = a_list(response.get("prompt_token_ids"))
        for position, given in enumerate(choices):
            index = given.get("index")
            index = position if index is None else index
            if isinstance(index, int) and index not in outcome.choices:
                choice = outcome.choice(index)
                choice.prompt_ids = a_list(given.get("prompt_token_ids")) or prompt_ids
                choice.token_ids = a_list(given.get("token_ids"))
                choice.logprobs = self.logprobs(body, given)
                choice.versions = given.get("weight_versions")
                choice.finish_reason = str(given.get("finish_reason") or "")
                choice.failed = unfinished(choice.finish_reason)
                if response.get("error"):
                    choice.failed = reported(response["error"]).message
                choice.output = self.output(given)
        return outcome

    def is_aborted(self, response: Any, *, ours: bool) -> bool:
        choices = response.get("choices") if isinstance(response, dict) else None
        return isinstance(choices, list) and any(
            isinstance(choice, dict) and choice.get("finish_reason") == ABORTED for choice in choices
        )

    def strip(self, body: Json, response: Any) -> None:
        if not body.get("return_token_ids"):
            response.pop("prompt_token_ids", None)
        for choice in response["choices"]:
            self.strip_choice(body, choice)

    def strip_choice(self, body: Json, choice: Json) -> None:
        """Token ids, logprobs and versions only where the agent asked for them itself."""
        if not body.get("return_token_ids"):
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
        if not body.get("return_weight_versions"):
            choice.pop("weight_versions", None)
        if not self.wants_logprobs(body):
            choice["logprobs"] = None

    @abstractmethod
    def logprobs(self, body: Json, choice: Json) -> list[float] | None:
        """One a token of this choice, or of this chunk of one."""

    @abstractmethod
    def output(self, choice: Json) -> Any:
        """Of a whole choice."""


class ChoicesStream(Stream):
    """Subclasses fold and join the texts."""

    def __init__(self, api: ChoicesApi, body: Json, count: int, *, strip: bool) -> None:
        super().__init__()
        self._api = api
        self._body = body
        self._count = count
        self._usage_wanted = wants_usage(body)
        self._ids_wanted = bool(body.get("return_token_ids"))
        wanted = (self._ids_wanted, api.wants_logprobs(body), bool(body.get("return_weight_versions")))
        self._quiet = not any(wanted)
        self._ours = strip
        self._strip = strip and not (self._usage_wanted and all(wanted))
        self._finished: set[int] = set()

    @property
    def complete(self) -> bool:
        return len(self._finished) >= self._count or self._is_over

    @property
    def _is_over(self) -> bool:
        """Whether a provider says so of an answer that is not all that was asked for."""
        return self.ended and not self._ours and bool(self.outcome.choices)

    def feed(self, event: sse.Event) -> tuple[bytes, bytes]:
        if not event.data:  # a comment: keeps the connection alive
            return (b"", b"") if self._finished else (event.raw, b"")
        if event.data == DONE:
            self.ended = True
            for choice in self.outcome.choices.values():
                choice.failed = choice.failed or unfinished(choice.finish_reason)
            return b"", event.raw
        chunk = parse_data(event)
        if chunk.get("error"):
            raise reported(chunk["error"])
        choices = chunk.get("choices")
        if choices is None and not self._ours:
            if not isinstance(chunk.get("usage"), dict):
                return (b"", event.raw) if self._finished else (event.raw, b"")  # a provider's own: a ping
            choices = []
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise invalid("has an event without choices")
        read_header(self.outcome, chunk)
        waits = self.complete
        prompt_ids = chunk.get("prompt_token_ids")
        for given in choices:
            waits = self._fold(given, prompt_ids) or waits
        raw = self._stripped(chunk, choices) if self._strip else event.raw
        if not self._ours and not choices and not self._usage_wanted and isinstance(chunk.get("usage"), dict):
            raw = b""  # what a provider was asked for by us
        return (b"", raw) if waits else (raw, b"")

    def _fold(self, given: Json, prompt_ids: Any) -> bool:
        """Whether the choice is at its end. Raises ApiError(502), and Aborted once it is folded."""
        index = given.get("index")
        index = 0 if index is None else index  # some providers leave it out
        if not isinstance(index, int) or not 0 <= index < self._count:
            raise invalid(f"has a choice {index!r:.40}; {self._count} were asked for")
        choice = self.outcome.choice(index)
        found = a_list(given.get("prompt_token_ids")) or a_list(prompt_ids)
        if found is not None and choice.prompt_ids is None:
            choice.prompt_ids = found
        choice.token_ids = _extended(choice.token_ids, given.get("token_ids"))
        choice.logprobs = _extended(choice.logprobs, self._api.logprobs(self._body, given))
        self._fold_versions(choice, given.get("weight_versions"))
        self.fold_text(index, given)
        if not self.speaks:
            self.speaks = bool(given.get("token_ids")) or self.says_something(given)
        if given.get("finish_reason"):
            if given["finish_reason"] == ABORTED:
                raise Aborted
            choice.finish_reason = str(given["finish_reason"])
            choice.failed = unfinished(choice.finish_reason)
            self._finished.add(index)
        return index in self._finished

    @staticmethod
    def _fold_versions(choice: Choice, given: Any) -> None:
        """Places count from the answer's first token. A list that begins there is all of it, another goes on."""
        if not isinstance(given, list) or not given:
            return
        begins = isinstance(given[0], dict) and not given[0].get("start")
        choice.versions = given if begins or choice.versions is None else choice.versions + given

    def _stripped(self, chunk: Json, choices: list[Json]) -> bytes:
        """The chunk as the agent would have got it without what we asked for: nothing where it is only that."""
        if not self._usage_wanted and chunk.pop("usage", None) is not None and not choices:
            return b""
        if not self._ids_wanted:
            chunk.pop("prompt_token_ids", None)
        empty = self._quiet and bool(choices)
        for choice in choices:
            self._api.strip_choice(self._body, choice)
            empty = empty and not choice.get("finish_reason") and self.says_nothing(choice)
        return b"" if empty else sse.event(to_bytes(chunk))

    @abstractmethod
    def fold_text(self, index: int, given: Json) -> None: ...

    @abstractmethod
    def says_something(self, choice: Json) -> bool:
        """Whether a chunk's choice has text, or some of a tool's call."""

    @abstractmethod
    def says_nothing(self, choice: Json) -> bool:
        """Whether a chunk's choice without token ids and logprobs would not have been sent."""


def read_header(outcome: Outcome, answer: Json) -> None:
    """What stands beside the choices, in an answer or a chunk."""
    if not outcome.response_id and answer.get("id"):
        outcome.response_id = str(answer["id"])
    if not outcome.model and answer.get("model"):
        outcome.model = str(answer["model"])
    usage = answer.get("usage")
    if isinstance(usage, dict):
        outcome.input_tokens = whole_number(usage.get("prompt_tokens"))
        outcome.output_tokens = whole_number(usage.get("completion_tokens"))


def _extended(found: list[Any] | None, more: Any) -> list[Any] | None:
    if not isinstance(more, list):
        return found
    if found is None:
        return list(more)
    found.extend(more)
    return found


def wants_usage(body: Json) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def a_list(value: Any) -> list[Any] | None:
    return value if isinstance(value, list) else None


def number_of_choices(body: Json) -> int:
    """`n`. Raises ApiError(400)."""
    count = body.get("n")
    if count is None:
        return 1
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_CHOICES:
        raise ApiError(400, "invalid_n", f"n must be a whole number from 1 to {MAX_CHOICES}", param="n")
    return count

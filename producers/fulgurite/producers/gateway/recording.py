"""From what the backend answered to what is recorded: the spans of a call, a dead letter where it cannot be recorded.

Promises: a span carries exactly the ids, logprobs and versions that the backend said it sampled, one logprob a token;
nothing is re-tokenised and nothing guessed. What does not add up (no ids, wrong lengths, a logprob that is no number)
gives an error span without tokens, and a dead letter with the original answer. Knows neither HTTP nor Kafka.

Of an answer that did not come to its end (the agent hung up, the backend broke off or says so itself) the span has
status `error` and an empty finish_reason, and the tokens that came, as far as they add up: whoever trains must leave
error spans out.

An external provider, and a route on which the policy's server gives no ids, is recorded by texts, usage and finish
reason: a span without tokens, which is nothing to train on and no dead letter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from pydantic import ValidationError

from fulgurite.producers.gateway.attributes import (
    ATTRIBUTE_CHOICE,
    ATTRIBUTE_ERROR,
    ATTRIBUTE_INPUT_OF_CHOICE,
    ATTRIBUTE_VERSION_LABELS,
    error_attributes,
    request_attributes,
    served_attributes,
)
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import BACKEND_ERROR, AgentGone, ApiError
from fulgurite.producers.gateway.outcome import Choice, Outcome, Served
from fulgurite.producers.gateway.protocols.base import to_json, written
from fulgurite.producers.gateway.tokens import Tokens, check_count, counted
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.event import MAX_TEXT_CHARS
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.spans import Span

STAGE: Final = "gateway"
_NO_CHOICE: Final = "no_choice"

MAX_ERROR_CHARS: Final = 2_000
MAX_INPUT_CHARS: Final = 4_000_000
"""Of all spans of a call together: beyond it, an input stands in the span of the first choice that it is of."""


@dataclass(slots=True)
class Recording:
    """All that one call leaves on the log."""

    spans: list[Span] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    answer: bytes | Outcome | None = None
    """What the backend said, for a dead letter: its bytes, or what they were put together to."""

    repeated_tokens: int = 0
    """Of prompts that stand in more than one span: each answer to it has it."""

    @property
    def tokens(self) -> int:
        """What the call cost, each prompt once."""
        return sum(span.input_tokens + span.output_tokens for span in self.spans) - self.repeated_tokens


class Recorder:
    """Makes recordings. Without state."""

    def answered(self, call: Call, served: Served, outcome: Outcome, answer: bytes | None = None) -> Recording:
        """A span a choice, for an answer that came to its end."""
        return self._spans(call, served, outcome, answer, None)

    def interrupted(
        self, call: Call, served: Served, outcome: Outcome, error: ApiError, rejected: bytes | None = None
    ) -> Recording:
        """The same, for one that did not: what came of it. `rejected` is what in it is no answer: a dead letter."""
        recording = self._spans(call, served, outcome, None, error)
        if rejected is not None:
            recording.dead_letters = [_dead_letter(call, rejected, error.code, error.message)]
        return recording

    def failed(self, call: Call, error: ApiError, served: Served | None = None, sampled: bytes = b"") -> Recording:
        """One error span for a call without an answer of the model. What was `sampled` for it all the same is counted,
        and is a dead letter, unless nobody is there any more who wanted it."""
        given = _Input(0, text=call.api.input_of(call.body, 0))
        span = _error_span(call, given, error.message, error_attributes(error, served), served)
        span.input_tokens, span.output_tokens = counted(sampled)
        lost = sampled and not isinstance(error, AgentGone)
        return Recording([span], [_dead_letter(call, sampled, error.code, error.message)] if lost else [])

    def unreadable(self, call: Call, served: Served, answer: bytes, error: ApiError) -> Recording:
        """A 200 that is no answer: error span and dead letter."""
        recording = self.failed(call, error, served, answer)
        recording.dead_letters = [_dead_letter(call, answer, error.code, error.message)]
        return recording

    def too_large(self, call: Call, recording: Recording, index: int, error: InvalidEvent) -> Recording:
        """What is left of a choice whose span exceeds the bound of a record: an error span without texts or tokens."""
        small = Recording(answer=recording.answer)
        _reject(small, call, None, _Input(index), error, texts=False)
        return small

    def _spans(
        self, call: Call, served: Served, outcome: Outcome, answer: bytes | None, broken: ApiError | None
    ) -> Recording:
        recording = Recording(answer=answer or outcome)
        end_ns = max(now_ns(), call.start_ns)
        inputs = _inputs(call)
        counted: set[int] = set()
        miscounted: InvalidEvent | None = None
        try:
            if not broken:
                check_count(outcome)
        except InvalidEvent as error:
            miscounted = error
        for index in range(call.choices):
            try:
                if miscounted:
                    raise miscounted
                span = _span(call, served, outcome, inputs[index], end_ns, broken)
                recording.spans.append(span)
                recording.repeated_tokens += span.input_tokens if inputs[index].first in counted else 0
                counted.add(inputs[index].first)
            except InvalidEvent as error:
                _reject(recording, call, served, inputs[index], error)
        return recording


@dataclass(slots=True, frozen=True)
class _Input:
    """Of one choice: its text, and what says where the text is when it is not here."""

    index: int
    first: int = 0
    """The first choice that has it."""
    text: str = ""
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])


def _inputs(call: Call) -> list[_Input]:
    """Of every choice: a long prompt with many answers is not copied into each."""
    first = [call.api.first_with_input(call.body, index) for index in range(call.choices)]
    texts = {at: call.api.input_of(call.body, at) for at in set(first)}
    everywhere = sum(len(texts[at]) for at in first) <= MAX_INPUT_CHARS
    return [
        _Input(index, at, texts[at])
        if everywhere or at == index
        else _Input(index, at, attributes={ATTRIBUTE_INPUT_OF_CHOICE: at})
        for index, at in enumerate(first)
    ]


def _span(call: Call, served: Served, outcome: Outcome, given: _Input, end_ns: int, broken: ApiError | None) -> Span:
    index = given.index
    choice = outcome.choices.get(index)
    if choice is None:
        if not broken:
            raise InvalidEvent(
                _NO_CHOICE, f"the backend gave {len(outcome.choices)} choices, number {index} is not there"
            )
        choice = Choice()
    ids_expected = served.kind == "vllm" and call.api.gives_ids(call.body)
    tokens = Tokens.of(choice, served, required=ids_expected and not broken)
    attributes = (
        request_attributes(call, grammar=served.grammar, sampling=served.sampling)
        | served_attributes(served)
        | given.attributes
    )
    if broken:
        attributes |= error_attributes(broken, served)
    elif choice.failed:
        attributes[ATTRIBUTE_ERROR] = BACKEND_ERROR
    failed = broken.message if broken else choice.failed
    if call.choices > 1:
        attributes[ATTRIBUTE_CHOICE] = index
    if tokens.labels:
        attributes[ATTRIBUTE_VERSION_LABELS] = tokens.labels
    if outcome.response_id:
        attributes["gen_ai.response.id"] = outcome.response_id
    # Usage is of all choices together: it stands on the first where tokens do not say it of each.
    counted = (outcome.input_tokens or 0, outcome.output_tokens or 0) if index == 0 else (0, 0)
    try:
        return Span(
            **_identity(call, index),
            name=_name(call),
            kind="client",
            status="error" if failed else "ok",
            status_message=failed[:MAX_ERROR_CHARS],
            start_ns=call.start_ns,
            end_ns=end_ns,
            agent=call.agent,
            operation=call.api.operation,
            resource=served.resource,
            model=outcome.model or call.model,
            endpoint=served.endpoint,
            prompt_token_ids=tokens.prompt_ids,
            response_token_ids=tokens.ids,
            logprobs=tokens.logprobs,
            weight_versions=tokens.versions,
            finish_reason="" if failed else choice.finish_reason,
            input=given.text,
            output=choice.output if isinstance(choice.output, str) else to_json(choice.output),
            input_tokens=len(tokens.prompt_ids) or counted[0],
            output_tokens=len(tokens.ids) or counted[1],
            attributes=attributes,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidEvent("bad_field", f"{where or 'span'}: {first['msg']}") from None


def _reject(
    recording: Recording,
    call: Call,
    served: Served | None,
    given: _Input,
    error: InvalidEvent,
    *,
    texts: bool = True,
) -> None:
    attributes: dict[str, Any] = {ATTRIBUTE_ERROR: error.reason}
    if call.choices > 1:
        attributes[ATTRIBUTE_CHOICE] = given.index
    message = f"{error.reason}: {error}"
    recording.spans.append(_error_span(call, given, message, attributes, served, texts=texts))
    # Of a provider that does not know `n`, what it gave is recorded.
    is_lost = served is None or served.kind == "vllm" or error.reason != _NO_CHOICE
    if is_lost and not recording.dead_letters:  # one a call: the answer is one
        recording.dead_letters.append(_dead_letter(call, recording.answer, error.reason, str(error)))


def _error_span(
    call: Call, given: _Input, message: str, attributes: dict[str, Any], served: Served | None, *, texts: bool = True
) -> Span:
    return Span(
        **_identity(call, given.index),
        name=_name(call),
        kind="client",
        status="error",
        status_message=message[:MAX_ERROR_CHARS],
        start_ns=call.start_ns,
        end_ns=max(now_ns(), call.start_ns),
        agent=call.agent,
        operation=call.api.operation,
        resource=served.resource if served else "",
        model=call.model[:512],
        endpoint=served.endpoint if served else "",
        input=given.text[:MAX_TEXT_CHARS],
        attributes=attributes | given.attributes | (request_attributes(call) if texts else {}),
    )


def _identity(call: Call, index: int) -> dict[str, Any]:
    return {
        "rollout_id": call.rollout_id,
        "attempt_id": call.attempt_id,
        "sequence_id": call.sequence_ids[index],
        "trace_id": call.trace_id,
        "span_id": call.span_ids[index],
        "parent_span_id": call.parent_span_id,
    }


def _name(call: Call) -> str:
    return f"{call.api.operation} {call.model}".strip()[:512]


def _dead_letter(call: Call, answer: bytes | Outcome | None, reason: str, message: str) -> DeadLetter:
    return DeadLetter(
        topic="",
        partition=-1,
        offset=-1,
        stage=STAGE,
        reason=reason,
        message=f"{call.rollout_id or '-'}/{call.attempt_id or '-'}, span {call.span_ids[0]}: {message}",
        key=call.rollout_id.encode() or None,
        value=_told(answer) if isinstance(answer, Outcome) else answer,
    )


def _told(outcome: Outcome) -> bytes:
    choices = {str(index): _fields(choice) for index, choice in outcome.choices.items()}
    return written(_fields(outcome) | {"choices": choices})


def _fields(part: Outcome | Choice) -> dict[str, Any]:
    return {each.name: getattr(part, each.name) for each in fields(part)}

"""From what the backend answered to what is recorded: the spans of a call, a dead letter where it cannot be recorded.

Promises: a span carries exactly the ids, logprobs and versions that the backend said it sampled, one logprob a token;
nothing is re-tokenised and nothing guessed. What does not add up (no ids, wrong lengths, a logprob that is no number)
gives an error span without tokens, and a dead letter with the original answer. Knows neither HTTP nor Kafka.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from pydantic import ValidationError

from fulgurite.producers.gateway.backend import Answer
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.event import MAX_TEXT_CHARS, VersionSpan
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.settings import GatewaySettings
from fulgurite.schemas.spans import OPERATION_CHAT, Span

STAGE: Final = "gateway"

REQUEST_ATTRIBUTES: Final = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "min_p": "gen_ai.request.min_p",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "repetition_penalty": "gen_ai.request.repetition_penalty",
    "stop": "gen_ai.request.stop_sequences",
    "n": "gen_ai.request.choice.count",
}
"""Field of the request -> OpenTelemetry's name; min_p and repetition_penalty, which it does not know, in its manner.

Logprobs are the policy's only where those that shape the distribution are neutral: the assembler reads them here."""

ATTRIBUTE_TOOLS: Final = "gen_ai.tool.definitions"
ATTRIBUTE_ERROR: Final = "error.type"
ATTRIBUTE_BACKEND_STATUS: Final = "http.response.status_code"
ATTRIBUTE_BACKEND_SECONDS: Final = "fulgurite.backend_seconds"
ATTRIBUTE_TRIES: Final = "fulgurite.backend_tries"
ATTRIBUTE_RETRY: Final = "fulgurite.retry_count"
"""Above 0, how often the agent's client had asked this before; the assembler leaves out the calls it gave up."""
ATTRIBUTE_CHOICE: Final = "fulgurite.choice"
ATTRIBUTE_VERSION_LABELS: Final = "fulgurite.weight_version_labels"
"""Labels that could not be recorded as the version: not numbers, or different before and after the call."""

MAX_ERROR_CHARS: Final = 2_000
_VERSION_LABEL = re.compile(r"[0-9]{1,18}")


@dataclass(slots=True)
class Recording:
    """All that one call leaves on the log."""

    spans: list[Span] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)


class Recorder:
    """Makes recordings; holds the settings that stand on every span."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._resource = settings.resource
        self._endpoint = settings.backend_url

    def answered(self, call: Call, answer: Answer, response: dict[str, Any]) -> Recording:
        """A span a choice, for an answer that the agent will get."""
        recording = Recording()
        end_ns = max(now_ns(), call.start_ns)
        for index in range(call.choices):
            try:
                recording.spans.append(self._span(call, answer, response, index, end_ns))
            except InvalidEvent as error:
                self._reject(recording, call, answer, index, error)
        return recording

    def failed(self, call: Call, error: ApiError, answer: Answer | None = None) -> Recording:
        """One error span for a call without an answer of the model."""
        attributes: dict[str, Any] = {ATTRIBUTE_ERROR: error.code, ATTRIBUTE_BACKEND_STATUS: error.status}
        if answer:
            attributes |= {ATTRIBUTE_BACKEND_SECONDS: answer.seconds, ATTRIBUTE_TRIES: answer.tries}
        return Recording([self._error_span(call, 0, error.message, attributes)])

    def too_large(self, call: Call, answer: Answer | None, index: int, error: InvalidEvent) -> Recording:
        """What is left of a choice whose span exceeds the bound of a record: an error span without texts or tokens."""
        recording = Recording()
        self._reject(recording, call, answer, index, error, texts=False)
        return recording

    def unreadable(self, call: Call, answer: Answer, error: ApiError) -> Recording:
        """A 200 that is no chat completion: error span and dead letter."""
        recording = self.failed(call, error, answer)
        recording.dead_letters.append(_dead_letter(call, answer, error.code, error.message))
        return recording

    def _reject(
        self,
        recording: Recording,
        call: Call,
        answer: Answer | None,
        index: int,
        error: InvalidEvent,
        *,
        texts: bool = True,
    ) -> None:
        attributes: dict[str, Any] = {ATTRIBUTE_ERROR: error.reason}
        if call.choices > 1:
            attributes[ATTRIBUTE_CHOICE] = index
        recording.spans.append(self._error_span(call, index, f"{error.reason}: {error}", attributes, texts=texts))
        if not recording.dead_letters:  # one a call: the answer is one
            recording.dead_letters.append(_dead_letter(call, answer, error.reason, str(error)))

    def _span(self, call: Call, answer: Answer, response: dict[str, Any], index: int, end_ns: int) -> Span:
        choice = _choice(response, index)
        prompt_ids = response.get("prompt_token_ids")
        response_ids = choice.get("token_ids")
        if not isinstance(prompt_ids, list) or not isinstance(response_ids, list):
            raise InvalidEvent("no_token_ids", "the backend gave no token ids (does it know return_token_ids?)")
        logprobs = _logprobs(choice)
        if len(logprobs) != len(response_ids):
            raise InvalidEvent("wrong_length", f"{len(logprobs)} logprobs for {len(response_ids)} tokens")
        versions, labels = _versions(choice, answer, len(response_ids))
        attributes = _request_attributes(call)
        attributes[ATTRIBUTE_BACKEND_SECONDS] = answer.seconds
        if answer.tries > 1:
            attributes[ATTRIBUTE_TRIES] = answer.tries
        if call.choices > 1:
            attributes[ATTRIBUTE_CHOICE] = index
        if labels:
            attributes[ATTRIBUTE_VERSION_LABELS] = labels
        if response.get("id"):
            attributes["gen_ai.response.id"] = response["id"]
        try:
            return Span(
                **_identity(call, index),
                name=_name(call),
                kind="client",
                status="ok",
                start_ns=call.start_ns,
                end_ns=end_ns,
                agent=call.agent,
                operation=OPERATION_CHAT,
                resource=self._resource,
                model=str(response.get("model") or call.model),
                endpoint=self._endpoint,
                prompt_token_ids=prompt_ids,
                response_token_ids=response_ids,
                logprobs=logprobs,
                weight_versions=versions,
                finish_reason=str(choice.get("finish_reason") or ""),
                input=_json(call.body["messages"]),
                output=_json(choice.get("message")),
                input_tokens=len(prompt_ids),
                output_tokens=len(response_ids),
                attributes=attributes,
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidEvent("bad_field", f"{where or 'span'}: {first['msg']}") from None

    def _error_span(
        self, call: Call, index: int, message: str, attributes: dict[str, Any], *, texts: bool = True
    ) -> Span:
        return Span(
            **_identity(call, index),
            name=_name(call),
            kind="client",
            status="error",
            status_message=message[:MAX_ERROR_CHARS],
            start_ns=call.start_ns,
            end_ns=max(now_ns(), call.start_ns),
            agent=call.agent,
            operation=OPERATION_CHAT,
            resource=self._resource,
            model=call.model[:512],
            endpoint=self._endpoint,
            input=_json(call.body["messages"])[:MAX_TEXT_CHARS] if texts else "",
            attributes=attributes | (_request_attributes(call) if texts else {}),
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
    return f"{OPERATION_CHAT} {call.model}".strip()[:512]


def _request_attributes(call: Call) -> dict[str, Any]:
    found = {name: call.body[key] for key, name in REQUEST_ATTRIBUTES.items() if call.body.get(key) is not None}
    if call.retry_count:
        found[ATTRIBUTE_RETRY] = call.retry_count
    if call.body.get("tools"):
        found[ATTRIBUTE_TOOLS] = _json(call.body["tools"])
    return found


def _choice(response: dict[str, Any], index: int) -> dict[str, Any]:
    """The choice that says it is number `index`; backends may give them in any order."""
    for position, choice in enumerate(response["choices"]):
        if choice.get("index", position) == index:
            return choice
    raise InvalidEvent("no_choice", f"the backend gave {len(response['choices'])} choices, number {index} is not there")


def _logprobs(choice: dict[str, Any]) -> list[float]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None and choice["token_ids"]:
        raise InvalidEvent("no_logprobs", "the backend gave no logprobs")
    try:
        return [token["logprob"] for token in content or ()]
    except (TypeError, KeyError):
        raise InvalidEvent("no_logprobs", "a token of the backend's logprobs.content has no logprob") from None


def _versions(choice: dict[str, Any], answer: Answer, tokens: int) -> tuple[list[VersionSpan], list[str]]:
    """(versions of the tokens, labels that are no versions).

    Without versions of its own the answer is bounded from outside: versions only grow, so the same label before and
    after means that it sampled every token.
    """
    given = choice.get("weight_versions")
    if given is None:
        labels = [label for label in (answer.version_before, answer.version_after) if label is not None]
        if len(labels) == 2 and labels[0] == labels[1] and _VERSION_LABEL.fullmatch(labels[0]):
            return ([VersionSpan(version=int(labels[0]), start=0, end=tokens)] if tokens else []), []
        return [], labels
    try:
        parts = [(str(part["version"]), part["start"], part["end"]) for part in given]
        labels = [label for label, _, _ in parts]
        if not all(_VERSION_LABEL.fullmatch(label) for label in labels):
            return [], labels  # "default": a server whose weights nobody has numbered
        return [
            VersionSpan(version=int(label), start=start, end=end) for label, start, end in parts if start != end
        ], []
    except (TypeError, KeyError, ValidationError):
        raise InvalidEvent("bad_field", "weight_versions is not a list of {version, start, end}") from None


def _dead_letter(call: Call, answer: Answer | None, reason: str, message: str) -> DeadLetter:
    return DeadLetter(
        topic="",
        partition=-1,
        offset=-1,
        stage=STAGE,
        reason=reason,
        message=f"{call.rollout_id or '-'}/{call.attempt_id or '-'}, span {call.span_ids[0]}: {message}",
        key=call.rollout_id.encode() or None,
        value=answer.body if answer else None,
    )


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()

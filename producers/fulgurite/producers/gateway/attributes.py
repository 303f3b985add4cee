"""The attributes of a call's spans: what was asked, who answered, how long it took. Pure.

Names are OpenTelemetry's `gen_ai.*` where it has one; `fulgurite.*` elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.outcome import Served
from fulgurite.producers.gateway.protocols.base import to_json
from fulgurite.schemas.sampling import constraints

REQUEST_ATTRIBUTES: Final = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "min_p": "gen_ai.request.min_p",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "repetition_penalty": "gen_ai.request.repetition_penalty",
    "stop": "gen_ai.request.stop_sequences",
    "stop_sequences": "gen_ai.request.stop_sequences",
    "stop_token_ids": "gen_ai.request.stop_token_ids",
    "ignore_eos": "gen_ai.request.ignore_eos",
    "length_penalty": "gen_ai.request.length_penalty",
    "reasoning_effort": "gen_ai.request.reasoning_effort",
    "n": "gen_ai.request.choice.count",
}
"""Field of the request -> OpenTelemetry's name; those it does not know (min_p, ignore_eos, …) in its manner. Of what
the request leaves open or a server changes, what was really sampled with.

Logprobs are the policy's only where those that shape the distribution are neutral: the assembler reads them here."""

WRITTEN_ATTRIBUTES: Final = {
    name: f"gen_ai.request.{name}"
    for name in (
        "logit_bias",
        "min_tokens",
        "bad_words",
        "allowed_token_ids",
        "response_format",
        "structured_outputs",
        "thinking_token_budget",
        "top_logprobs",
        "tool_choice",
        "parallel_tool_calls",
    )
}
"""The same of fields whose values may be of any depth and length: a number or word as it is, else as JSON, cut at
MAX_VALUE_CHARS."""
MAX_VALUE_CHARS: Final = 4_096

ATTRIBUTE_CONSTRAINTS: Final = "fulgurite.request.constraints"
"""Which fields of the request forbid or shift tokens, or may. The assembler reads it."""
OF_TOOLS: Final = frozenset({"tools", "parallel_tool_calls"})
"""Those among them of which it is the server's parser that decides whether they do."""
GRAMMAR: Final = "structured_outputs"
"""Named there as well where the server says that it held an answer to one, whatever the request said."""
ATTRIBUTE_STREAM: Final = "gen_ai.request.stream"
ATTRIBUTE_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
ATTRIBUTE_TOOLS: Final = "gen_ai.tool.definitions"
ATTRIBUTE_ERROR: Final = "error.type"
ATTRIBUTE_BACKEND_STATUS: Final = "http.response.status_code"
ATTRIBUTE_BACKEND_SECONDS: Final = "fulgurite.backend_seconds"
ATTRIBUTE_TRIES: Final = "fulgurite.backend_tries"
ATTRIBUTE_RETRY: Final = "fulgurite.retry_count"
"""Above 0, how often the agent's client had asked this before; the assembler leaves out the calls it gave up."""
ATTRIBUTE_REQUEST_DIGEST: Final = "fulgurite.request_digest"
"""Of a rollout's call: the same where the same was asked, whatever of its words is recorded. The assembler reads it."""
_DIGEST_BYTES: Final = 8
ATTRIBUTE_CHOICE: Final = "fulgurite.choice"
ATTRIBUTE_INPUT_OF_CHOICE: Final = "fulgurite.input_of_choice"
"""Where the input is left out, the number of the choice whose span has it."""
ATTRIBUTE_VERSION_LABELS: Final = "fulgurite.weight_version_labels"
"""Labels that could not be recorded as the version of tokens: not numbers, different before and after the call, or of
an answer without token ids."""


def request_attributes(
    call: Call, *, grammar: bool | None = None, sampling: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """`grammar`: whether the server held the answer to one, where it says so. `sampling`: what it says that it really
    sampled with, which may be defaults of its own."""
    found: dict[str, Any] = {}
    for key, value in call.body.items():
        if value is not None and (name := REQUEST_ATTRIBUTES.get(key)):
            found[name] = value if _fits(value) else to_json(value)
        elif value is not None and (name := WRITTEN_ATTRIBUTES.get(key)):
            found[name] = _bounded(value)
    found |= {REQUEST_ATTRIBUTES[name]: value for name, value in (sampling or {}).items()}
    names = constraints(call.body)
    if grammar is not None:  # it knows better what became of tools
        names = [name for name in names if name not in OF_TOOLS]
        names += [GRAMMAR] if grammar and GRAMMAR not in names else []
    if names:
        found[ATTRIBUTE_CONSTRAINTS] = names
    if call.retry_count:
        found[ATTRIBUTE_RETRY] = call.retry_count
    if call.rollout_id:
        found[ATTRIBUTE_REQUEST_DIGEST] = blake2b(call.agent_body, digest_size=_DIGEST_BYTES).hexdigest()
    if call.streamed:
        found[ATTRIBUTE_STREAM] = True
    if call.body.get("tools"):
        found[ATTRIBUTE_TOOLS] = to_json(call.body["tools"])
    return found


def _bounded(value: Any) -> Any:
    if isinstance(value, int | float) and _fits(value):
        return value
    return (value if isinstance(value, str) else to_json(value))[:MAX_VALUE_CHARS]


def _fits(value: Any) -> bool:
    """Whether tables take the value as a number: of more than 64 bits it is recorded as text."""
    if isinstance(value, list):
        return all(_fits(each) for each in value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def served_attributes(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = {ATTRIBUTE_BACKEND_SECONDS: served.seconds}
    if served.first_chunk_seconds is not None:
        found[ATTRIBUTE_FIRST_CHUNK] = served.first_chunk_seconds
    if served.tries > 1:
        found[ATTRIBUTE_TRIES] = served.tries
    return found


def error_attributes(error: ApiError, served: Served | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {ATTRIBUTE_ERROR: error.code, ATTRIBUTE_BACKEND_STATUS: error.status}
    return attributes | (served_attributes(served) if served else {})

"""A span: one thing an agent did. Direction: gateway, SDK, exporter, translator -> materialiser, assembler.

An LLM call is a span that also carries what was sampled, token by token. Attribute names are OpenTelemetry's `gen_ai.*`
where it has one; the fields below exist where it has none or where a column of its own pays.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from fulgurite.schemas.event import (
    Attributes,
    Event,
    Logprobs,
    Name,
    ShortText,
    Text,
    TimeNs,
    TokenIds,
    Unquoted,
    VersionSpan,
)
from fulgurite.schemas.ids import OptionalId, OptionalSpanId, SpanId

SpanKind = Literal["internal", "client", "server", "producer", "consumer"]
SpanStatus = Literal["unset", "ok", "error"]

OPERATION_CHAT = "chat"
OPERATION_TOOL = "execute_tool"
OPERATION_AGENT = "invoke_agent"


class SpanEvent(BaseModel):
    """Something that happened at one instant of a span."""

    name: Name
    time_ns: Annotated[TimeNs, Unquoted] = 0
    attributes: Attributes = Field(default_factory=dict)


class SpanLink(BaseModel):
    """A pointer to another span."""

    trace_id: OptionalId = ""
    span_id: OptionalSpanId = ""
    attributes: Attributes = Field(default_factory=dict)


class Span(Event):
    """Topic `spans`, key rollout_id. Identity: (rollout_id, attempt_id, span_id)."""

    rollout_id: OptionalId = ""
    """Empty for a trace that belongs to no rollout: kept as a trace, never trained on."""
    attempt_id: OptionalId = ""
    sequence_id: Annotated[int, Field(ge=0, lt=2**63), Unquoted] = 0
    """Order within the attempt where the producer knows it; 0 where it does not, and start_ns decides."""
    trace_id: OptionalId = ""
    span_id: SpanId
    parent_span_id: OptionalSpanId = ""
    name: Name
    kind: SpanKind = "internal"
    status: SpanStatus = "unset"
    status_message: ShortText = ""
    start_ns: Annotated[TimeNs, Unquoted]
    end_ns: Annotated[TimeNs, Unquoted]
    service: Name = ""
    agent: Name = ""
    operation: Name = ""
    """gen_ai.operation.name: chat, execute_tool, invoke_agent, …"""

    resource: Name = ""
    """Which policy answered (a resource name); empty when this is no LLM call of ours."""
    model: Name = ""
    endpoint: ShortText = ""
    prompt_token_ids: TokenIds = Field(default_factory=list)
    response_token_ids: TokenIds = Field(default_factory=list)
    logprobs: Logprobs = Field(default_factory=list)
    """log p of each response token under the policy that sampled it, same length as response_token_ids."""
    weight_versions: list[VersionSpan] = Field(default_factory=list)
    """Which version sampled which response tokens; spans cover response_token_ids without gap or overlap."""
    finish_reason: Name = ""
    input: Text = ""
    """What went in, as text or as JSON (the messages of a call, the arguments of a tool)."""
    output: Text = ""
    input_tokens: Annotated[int, Field(ge=0, lt=2**63), Unquoted] = 0
    output_tokens: Annotated[int, Field(ge=0, lt=2**63), Unquoted] = 0

    attributes: Attributes = Field(default_factory=dict)
    resource_attributes: Attributes = Field(default_factory=dict)
    events: list[SpanEvent] = Field(default_factory=list)
    links: list[SpanLink] = Field(default_factory=list)
    state: dict[str, Any] = Field(default_factory=dict)
    """What the agent knew at the start of this span, by name: gives transitions, not only text."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.end_ns < self.start_ns:
            raise ValueError(f"end_ns {self.end_ns} is before start_ns {self.start_ns}")
        tokens = len(self.response_token_ids)
        if len(self.logprobs) not in (0, tokens):
            raise ValueError(f"{len(self.logprobs)} logprobs for {tokens} response_token_ids")
        at = 0
        for part in self.weight_versions:
            if part.start != at or part.end <= part.start:
                raise ValueError(f"weight_versions do not cover the response: {part.start}..{part.end} after {at}")
            at = part.end
        if self.weight_versions and at != tokens:
            raise ValueError(f"weight_versions end at {at}, the response at {tokens}")
        return self

    def without_tokens(self) -> Self:
        """With all that was said in words."""
        nothing = dict[str, object](prompt_token_ids=[], response_token_ids=[], logprobs=[], weight_versions=[])
        return self.model_copy(update=nothing)

    @property
    def is_llm_call(self) -> bool:
        """Whether this span carries sampled tokens one can train on."""
        return bool(self.response_token_ids) and len(self.logprobs) == len(self.response_token_ids)

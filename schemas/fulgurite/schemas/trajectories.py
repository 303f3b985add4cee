"""A trajectory: one ended rollout, joined and ready to train on. Direction: assembler -> (aggregator ->) trainers.

One record a rollout, for its last attempt, whatever its end: a failed or cancelled rollout gives a record without
sequences, so that a trainer waiting for a group always learns that a member will not come.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from fulgurite.schemas.event import Event, Labels, Logprobs, Name, ShortText, TimeNs, TokenIds, Version, VersionSpan
from fulgurite.schemas.ids import Id, OptionalId, OptionalSpanId
from fulgurite.schemas.rollouts import MAX_GROUP_SIZE, FinalStatus, Mode
from fulgurite.schemas.spans import Span


class CallRange(BaseModel):
    """Where in a sequence the tokens stand that one call sampled."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    span_id: OptionalSpanId = ""
    number: Annotated[int, Field(ge=0)]
    """Its place among the rollout's calls, over all its sequences, from 0."""
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]
    """One past its last token."""


class TokenSequence(BaseModel):
    """Calls whose tokens continue each other exactly, merged. All four views have the length of token_ids (T)."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    token_ids: TokenIds
    loss_mask: list[Annotated[int, Field(ge=0, le=1)]]
    """[T] 1 where the policy sampled the token, 0 where it was given (prompt, tool result)."""
    logprobs: Logprobs
    """[T] log p under the policy that sampled the token; 0.0 where loss_mask is 0."""
    weight_versions: list[VersionSpan] = Field(default_factory=list)
    """Spans over token positions with loss_mask 1; sampled tokens without a known version are in none."""
    span_ids: list[OptionalSpanId] = Field(default_factory=list)
    """The calls that were merged, in order."""
    calls: list[CallRange] = Field(default_factory=list)
    """The same, with their tokens; empty in records of before there was such a field."""
    resource: Name = ""
    agent: Name = ""
    finish_reason: Name = ""
    """Of the last call."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        length = len(self.token_ids)
        if len(self.loss_mask) != length or len(self.logprobs) != length:
            raise ValueError(f"{length} token_ids, {len(self.loss_mask)} loss_mask, {len(self.logprobs)} logprobs")
        if any(part.end > length or part.end <= part.start for part in self.weight_versions):
            raise ValueError("weight_versions reach outside the sequence")
        if any(call.end > length or call.end <= call.start for call in self.calls):
            raise ValueError("calls reach outside the sequence")
        return self


MAX_LEFT_OUT = 64
"""Kinds of calls that are named; where there are more, none is."""


class LeftOutCall(BaseModel):
    """A kind of calls whose tokens are in no sequence."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    reason: Name
    """A word of `partial`."""
    agent: Name = ""
    resource: Name = ""


class TrajectoryReward(BaseModel):
    """One reward as it counted."""

    reward_id: Id
    name: Name
    value: FiniteFloat
    span_id: OptionalSpanId = ""
    counted: FiniteFloat | None = None
    """What of the rollout's own reward comes from this one, where an aggregator added it up: its value, weighed. None:
    nothing added it up, or the record is of before there was such a field."""


class Trajectory(Event):
    """Topic `trajectories`, key group_id (rollout_id where there is no group). Identity: rollout_id."""

    rollout_id: Id
    attempt_id: OptionalId = ""
    run_id: OptionalId = ""
    task_id: OptionalId = ""
    group_id: OptionalId = ""
    group_size: Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE)] = 1
    mode: Mode = "train"
    agent: Name = ""
    status: FinalStatus
    error: ShortText = ""
    partial: ShortText = ""
    """Why it is not whole, words with commas between them: the assembler's (`no_reward`, `no_calls`, `sampling`,
    `unattributed`, …), and an aggregator's, `reward_failed` (a part could not be had) and `unscored` (as records are
    missing, nothing but the agent's own reward was asked). Empty when it is whole."""
    left_out: Annotated[list[LeftOutCall], Field(max_length=MAX_LEFT_OUT)] = Field(default_factory=list[LeftOutCall])
    """Whose calls words of `partial` are about: who trains other agents or policies may pass over these words. A word
    that is not named here is about all of them."""
    sequences: list[TokenSequence] = Field(default_factory=list)
    rewards: list[TrajectoryReward] = Field(default_factory=list)
    reward: FiniteFloat | None = None
    """The rollout's own reward: the last one named `reward`, None where none came."""
    calls: Annotated[int, Field(ge=0)] = 0
    """LLM calls before merging."""
    min_version: Version | None = None
    max_version: Version | None = None
    queued_ns: TimeNs = 0
    finished_ns: TimeNs = 0
    assembled_ns: TimeNs = 0
    metadata: Labels = Field(default_factory=dict)

    def without_records(self) -> Self:
        """With nothing of its spans and rewards, and no metadata."""
        nothing: dict[str, object] = {"sequences": [], "rewards": [], "metadata": {}, "left_out": [], "calls": 0}
        return self.model_copy(update=nothing | {"min_version": None, "max_version": None})


class FinishedAttempt(Trajectory):
    """Topic `attempts`, key as of the trajectory. A trajectory that still lacks rewards, with what they are found in.

    Direction: assembler -> aggregator.
    """

    spans: list[Span] = Field(default_factory=list[Span])
    """All of the attempt that counts, in the order of their starts, without tokens: those are in `sequences`. None of
    a rollout that did not succeed."""

    def trajectory(self) -> Trajectory:
        """Without the spans."""
        found = Trajectory.model_construct(None, **{name: getattr(self, name) for name in Trajectory.model_fields})
        assert found.model_extra is not None, "events keep fields they do not know"
        found.model_extra.update(self.model_extra or {})
        return found

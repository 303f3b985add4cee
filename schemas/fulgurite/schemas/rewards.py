"""A reward. Direction: runner, SDK, reward models -> materialiser, assembler."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, FiniteFloat

from fulgurite.schemas.event import Event, Labels, Name, TimeNs
from fulgurite.schemas.ids import Id, OptionalId, OptionalSpanId, new_id, now_ns

FINAL_REWARD = "reward"
"""The name of the rollout's own reward. Of several with this name the last in the log counts."""

MAX_REWARD: Final = 1e9
"""What is added up or trained on is between ± this: sums and squares of rewards must stay numbers, also in float32."""

HEADER_AFTER_END = "fulgurite.after_end"
"""Kafka header of rewards given to a trajectory that exists (by the aggregator, by algorithms that read trajectories):
tables have them like all others; the assembler, whose work on the rollout is done, passes over them."""


class Reward(Event):
    """Topic `rewards`, key rollout_id. Identity: reward_id; the same one sent twice counts once."""

    reward_id: Id = Field(default_factory=new_id)
    rollout_id: Id
    attempt_id: OptionalId = ""
    span_id: OptionalSpanId = ""
    """The span or call it belongs to; empty for the whole attempt."""
    name: Name = FINAL_REWARD
    value: FiniteFloat
    dimensions: Annotated[dict[str, FiniteFloat], Field(max_length=64)] = Field(default_factory=dict)
    """Named parts where there are several; `value` is the one that trains."""
    source: Name = ""
    """Who says so: the runner, a reward model, a person."""
    time_ns: TimeNs = Field(default_factory=now_ns)
    metadata: Labels = Field(default_factory=dict)

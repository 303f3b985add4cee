"""The sum of a reward's parts, and the trajectory that it belongs to. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from fulgurite.schemas.rewards import FINAL_REWARD, MAX_REWARD, Reward
from fulgurite.schemas.settings import AggregatorSettings
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory, TrajectoryReward
from fulgurite.streams.algorithms.compliance import SOURCE as VIOLATION
from fulgurite.streams.algorithms.compliance import asked_for_by

SOURCE = "aggregator"
FAILED = "reward_failed"
"""In `partial`: a required part of the reward could not be had."""

UNSCORED = "unscored"
"""In `partial`: records are missing, so nothing that counts beside the agent's own reward was asked. It stands there
beside the word that says which, as a trainer of other agents may pass over that one: see `left_out`."""

NO_REWARD = "no_reward"
"""In `partial`: nobody gave one."""

AGENT = "agent"
"""The agent's own reward, among the dimensions of the sum."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one source gave."""

    name: str
    values: Mapping[str, float]
    """By name; the sum counts."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def value(self) -> float:
        return sum(self.values.values())


def clip(value: float, low: float | None, high: float | None) -> float:
    """
    >>> clip(3.0, 0.0, 1.0), clip(-0.5, None, 1.0)
    (1.0, -0.5)
    """
    value = value if low is None else max(value, low)
    return value if high is None else min(value, high)


def fault_of(name: str, value: float) -> str:
    """Why a number is no reward; empty where it is one.

    >>> fault_of("length", 1e12), fault_of("length", 12.0)
    ('length = 1e+12 is no reward: rewards are between ±1e+09', '')
    """
    within = abs(value) <= MAX_REWARD  # a NaN is not
    return "" if within else f"{name} = {value:g} is no reward: rewards are between ±{MAX_REWARD:g}"


def total(
    settings: AggregatorSettings, own: float | None, parts: Sequence[Part], violations: float | None
) -> tuple[float, dict[str, float]] | None:
    """The reward and what each part adds to it; None where there is nothing to add up.

    violations: minus their cost, weighed; None without rules that count. They are a part like the others: where only
    rules count, 0 says that nothing was violated.
    """
    by_name = {source.name: source for source in settings.sources}
    added: dict[str, float] = {}
    if settings.agent_weight and own is not None:
        added[AGENT] = settings.agent_weight * own
    for part in parts:
        source = by_name[part.name]
        added[part.name] = source.weight * clip(part.value, source.low, source.high)
    if violations is not None:
        added["compliance"] = violations
    if not added:
        return None
    return clip(sum(added.values()), settings.low, settings.high), added


def total_fault(
    settings: AggregatorSettings, own: float | None, added: tuple[float, Mapping[str, float]] | None
) -> str:
    """Why what `total` gave is no reward; empty where it is one, or where there is none."""
    if settings.agent_weight and own is not None and (fault := fault_of("the agent's own", own)):
        return fault
    if added is None:
        return ""
    value, parts = added
    if infinite := [name for name, each in parts.items() if not math.isfinite(each)]:
        return fault_of(f"{infinite[0]}, by its weight", parts[infinite[0]])
    said = ", ".join(f"{name} {each:g}" for name, each in parts.items())
    return fault_of(f"the sum of the parts ({said})", value)


def part_reward(attempt: FinishedAttempt, part: Part) -> Reward:
    """A part as it came, unweighed."""
    return Reward(
        reward_id=_id(attempt, part.name),
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        name=part.name,
        value=part.value,
        dimensions=dict(part.values) if len(part.values) > 1 else {},
        source=part.name,
        metadata=dict(part.metadata),
    )


def sum_reward(attempt: FinishedAttempt, value: float, added: Mapping[str, float]) -> Reward:
    """The rollout's own reward from now on: the last one of this name counts, and this one comes last."""
    return Reward(
        reward_id=_id(attempt, FINAL_REWARD),
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        name=FINAL_REWARD,
        value=value,
        dimensions=dict(added),
        source=SOURCE,
    )


def shares(
    attempt: FinishedAttempt, rewards: Iterable[Reward], added: Mapping[str, float], rules_weight: float
) -> dict[str, float]:
    """What of the sum comes from which reward, by their ids; its parts are the agent's own, sources and violations."""
    own = next((each for each in reversed(attempt.rewards) if each.name == FINAL_REWARD), None)
    found = {own.reward_id: added.get(AGENT, 0.0)} if own else {}
    for each in rewards:
        found[each.reward_id] = rules_weight * each.value if each.source == VIOLATION else added[each.name]
    return found


def rewarded(
    attempt: FinishedAttempt,
    rewards: Sequence[Reward],
    value: float | None,
    failed: bool,
    counted: Mapping[str, float] = MappingProxyType({}),
) -> Trajectory:
    """The trajectory with these rewards, and `value` as its own. counted: see `shares`. One that names a tool's span
    has there the call that asked for the tool: tokens are a call's."""
    partial = [reason for reason in attempt.partial.split(",") if reason]
    if failed:
        partial.append(FAILED)
    if value is not None:
        partial = [reason for reason in partial if reason != NO_REWARD]
    elif not failed:
        partial.append(NO_REWARD)
    askers = asked_for_by(attempt.spans) if any(one.span_id for one in rewards) else {}
    added = [
        TrajectoryReward(
            reward_id=one.reward_id, name=one.name, value=one.value, span_id=askers.get(one.span_id, one.span_id)
        )
        for one in rewards
    ]
    all_rewards = [
        one.model_copy(update={"counted": counted[one.reward_id]}) if one.reward_id in counted else one
        for one in (*attempt.rewards, *added)
    ]
    changes = {"rewards": all_rewards, "reward": value, "partial": ",".join(dict.fromkeys(partial))}
    return attempt.trajectory().model_copy(update=changes)


def passed_on(attempt: FinishedAttempt, settings: AggregatorSettings, *, lacks: bool) -> Trajectory:
    """The trajectory of an attempt that no source was asked about. Its reward is the agent's own by its weight, to be
    compared with others' sums; none where that does not count, or where a part is required that is not there. lacks:
    whether it says that something else would have counted."""
    added = total(settings, attempt.reward, [], None)
    required = any(source.required and source.agent in ("", attempt.agent) for source in settings.sources)
    has_none = required or added is None or total_fault(settings, attempt.reward, added)
    partial = ",".join([attempt.partial, UNSCORED]) if lacks else attempt.partial
    changes = {"reward": None if has_none or added is None else added[0], "partial": partial}
    return attempt.trajectory().model_copy(update=changes)


def given_up(attempt: FinishedAttempt) -> Trajectory:
    """Where nothing more can be published of it: without all that its records were, so that its group waits no more."""
    return rewarded(attempt, [], None, failed=True).without_records()


def _id(attempt: FinishedAttempt, name: str) -> str:
    """Always the same for an attempt's part: found again after a crash, it counts once."""
    return hashlib.sha256(f"{attempt.rollout_id}/{attempt.attempt_id}/{SOURCE}/{name}".encode()).hexdigest()[:32]

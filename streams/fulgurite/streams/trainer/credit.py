"""From a window's rewards to advantages, of rollouts or of each of their calls. Pure, no torch.

    rollout      every token of a rollout gets A, its rollout's advantage
    discounted   the tokens of call k of K get discount^(K - 1 - k) A: the last call is nearest to the reward
    call         call k led to R_k = r_k + discount R_(k+1); its tokens get R_k's advantage over all calls of the group

How a reward becomes an advantage is the recipe's (objectives/advantages.py) in each of them. `discounted` with discount
1 is `rollout`. A baseline over calls at different places of their rollouts is biased where what they lead to depends on
the place: `call` is for rewards of calls, not for a rollout's reward seen from each (objectives/credit.py). What an
aggregator made the rollout's reward of (`counted`) is there once: at the call that it names, else at the last. Other
rewards of calls come on top. Calls of other policies have no tokens here; what they earned counts for nobody but
through the rollout's reward. With KL in the reward the advantages are made anew of what is left: for REINFORCE++ token
by token, for others call by call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

from fulgurite.schemas.rewards import FINAL_REWARD
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.trajectories import CallRange, TokenSequence, Trajectory
from fulgurite.streams.objectives.advantages import BY_TOKEN, ESTIMATORS, has_signal
from fulgurite.streams.objectives.credit import span_returns, token_returns
from fulgurite.streams.objectives.rewards import penalised_rewards
from fulgurite.streams.trainer.objective import recipe_of
from fulgurite.streams.trainer.sample import Call, Sample


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one call."""

    reward: float
    tokens: int


Group = Sequence[Sequence[Outcome]]
"""[rollouts][calls]"""


def calls_of(
    trajectory: Trajectory, sequences: Sequence[TokenSequence], reward: float, settings: TrainerSettings
) -> list[tuple[Call, ...]]:
    """Of each of these sequences, the rollout's trained ones. `reward`: the rollout's, for its last call."""
    ranges = _ranges(sequences)
    last = max(call.number for calls in ranges for call in calls)
    earned: dict[int, float] = {}
    if settings.credit == "call":
        number_of = {call.span_id: call.number for calls in ranges for call in calls if call.span_id}
        linked = [(number_of[each.span_id], each) for each in trajectory.rewards if each.span_id in number_of]
        for number, each in linked:
            earned[number] = earned.get(number, 0.0) + (each.value if each.counted is None else each.counted)
            reward -= each.counted or 0.0  # a part of it that names its call: a violation's cost
        final = next((each for each in reversed(trajectory.rewards) if each.name == FINAL_REWARD), None)
        if final is not None and final.counted is None and final.span_id in number_of:
            reward -= final.value  # it names its call, and was counted there
    earned[last] = earned.get(last, 0.0) + reward
    return [
        tuple(Call(call.start, call.end, call.number, earned.get(call.number, 0.0)) for call in calls)
        for calls in ranges
    ]


def credited(samples: Sequence[Sample], settings: TrainerSettings) -> list[Sample]:
    """The same with advantages, from what their calls earned, over all groups there are."""
    groups = _places(samples)
    outcomes = [[[_outcome(samples[at].calls[place]) for at, place in calls] for calls in group] for group in groups]
    advantages = [[0.0] * len(sample.calls) for sample in samples]
    of_rollout: dict[str, float] = {}
    for group, found in zip(groups, call_advantages(outcomes, settings), strict=True):
        for calls, numbers in zip(group, found, strict=True):
            for (at, place), number in zip(calls, numbers, strict=True):
                advantages[at][place] = number
                of_rollout[samples[at].rollout_id] = number  # its last call's, which no discount touches
    uniform = settings.credit == "rollout"
    return [
        replace(sample, advantage=of_rollout[sample.rollout_id], advantages=() if uniform else tuple(own))
        for sample, own in zip(samples, advantages, strict=True)
    ]


def with_penalties(samples: Sequence[Sample], kl: Sequence[Sequence[float]], settings: TrainerSettings) -> list[Sample]:
    """The same after rewards paid for the KL of their tokens, [samples][sampled tokens]."""
    if recipe_of(settings).advantage in BY_TOKEN:
        return _credited_by_token(samples, kl, settings)
    lowered: list[Sample] = []
    for sample, own in zip(samples, kl, strict=True):
        sums = [sum(of_call) for of_call in sample.by_call(own)]
        left = penalised_rewards([call.reward for call in sample.calls], sums, settings.kl_coefficient)
        calls = tuple(replace(call, reward=reward) for call, reward in zip(sample.calls, left, strict=True))
        lowered.append(replace(sample, calls=calls))
    return credited(lowered, settings)


def _credited_by_token(
    samples: Sequence[Sample], kl: Sequence[Sequence[float]], settings: TrainerSettings
) -> list[Sample]:
    """What each token led to, compared over all groups there are."""
    discount = settings.credit_discount if settings.credit == "call" else 1.0
    of_calls = [sample.by_call(own) for sample, own in zip(samples, kl, strict=True)]
    led_to: list[list[Sequence[float]]] = [[()] * len(sample.calls) for sample in samples]
    for calls in chain.from_iterable(_places(samples)):
        rewards = [samples[at].calls[place].reward for at, place in calls]
        own = [of_calls[at][place] for at, place in calls]
        found = token_returns(rewards, own, settings.kl_coefficient, discount)
        for (at, place), returns in zip(calls, found, strict=True):
            led_to[at][place] = returns
    by_sample = [[value for returns in calls for value in returns] for calls in led_to]
    estimate = ESTIMATORS[recipe_of(settings).advantage]
    advantages = estimate(by_sample, [[1] * len(values) for values in by_sample])
    return [replace(sample, token_advantages=tuple(own)) for sample, own in zip(samples, advantages, strict=True)]


def call_advantages(groups: Sequence[Group], settings: TrainerSettings) -> list[list[list[float]]]:
    """[groups][rollouts][calls], each rollout's in their order -> the same shape."""
    estimate, discount = ESTIMATORS[recipe_of(settings).advantage], settings.credit_discount
    if settings.credit == "call":
        returns = [[span_returns([call.reward for call in calls], discount) for calls in group] for group in groups]
        tokens = [[call.tokens for calls in group for call in calls] for group in groups]
        flat = [iter(each) for each in estimate([[r for calls in group for r in calls] for group in returns], tokens)]
        return [[[next(each) for _ in calls] for calls in group] for each, group in zip(flat, groups, strict=True)]
    rewards = [[sum(call.reward for call in calls) for calls in group] for group in groups]
    tokens = [[sum(call.tokens for call in calls) for calls in group] for group in groups]
    gamma = discount if settings.credit == "discounted" else 1.0
    return [
        [
            span_returns([0.0] * (len(calls) - 1) + [advantage], gamma)
            for advantage, calls in zip(advantages, group, strict=True)
        ]
        for advantages, group in zip(estimate(rewards, tokens), groups, strict=True)
    ]


def teaches(calls_of_rollouts: Sequence[Sequence[Call]], settings: TrainerSettings) -> bool:
    """Whether a group's outcomes differ: of its rollouts, or of all their calls."""
    ordered = [sorted(calls, key=lambda call: call.number) for calls in calls_of_rollouts]
    rewards = [[call.reward for call in calls] for calls in ordered]
    if settings.credit != "call":
        return has_signal([sum(calls) for calls in rewards])
    return has_signal([value for calls in rewards for value in span_returns(calls, settings.credit_discount)])


def _places(samples: Sequence[Sample]) -> list[list[list[tuple[int, int]]]]:
    """[groups][rollouts][calls], each rollout's in their order: which sample, and which of its calls."""
    found: dict[int, dict[str, list[tuple[int, int, int]]]] = {}
    for at, sample in enumerate(samples):
        rollout = found.setdefault(sample.group, {}).setdefault(sample.rollout_id, [])
        rollout += [(call.number, at, place) for place, call in enumerate(sample.calls)]
    return [[[(at, place) for _, at, place in sorted(calls)] for calls in group.values()] for group in found.values()]


def _outcome(call: Call) -> Outcome:
    return Outcome(call.reward, call.end - call.start)


def _ranges(sequences: Sequence[TokenSequence]) -> list[list[CallRange]]:
    """Of a record without them: its runs of sampled tokens, with the calls' names where there are as many."""
    found: list[list[CallRange]] = []
    number = 0
    for sequence in sequences:
        ranges = sequence.calls
        if not ranges:
            runs = _runs(sequence.loss_mask)
            spans = sequence.span_ids if len(runs) == len(sequence.span_ids) else [""] * len(runs)
            ranges = [
                CallRange(span_id=span_id, number=number + place, start=start, end=end)
                for place, (span_id, (start, end)) in enumerate(zip(spans, runs, strict=True))
            ]
        number += len(ranges)
        found.append(ranges)
    return found


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Where it is 1 without a break: start, end."""
    runs: list[tuple[int, int]] = []
    at = 0
    for sampled, run in groupby(mask):
        length = len(list(run))
        if sampled:
            runs.append((at, at + length))
        at += length
    return runs

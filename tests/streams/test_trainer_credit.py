"""Which call of a rollout gets the credit for its reward, from trajectories to the advantages of tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.trajectories import CallRange, TokenSequence, Trajectory, TrajectoryReward
from fulgurite.streams.learners.packing import pack
from fulgurite.streams.objectives.advantages import BY_TOKEN, ESTIMATORS, group_advantages, mean_centred
from fulgurite.streams.objectives.credit import span_returns
from fulgurite.streams.trainer.credit import Outcome, call_advantages, calls_of, with_penalties
from fulgurite.streams.trainer.objective import check_objective
from fulgurite.streams.trainer.sample import Sample
from fulgurite.streams.trainer.samples import ModelLimits, TrainingSet, member_of, training_set
from fulgurite.streams.trainer.windows import Member, Window

MASK = [0, 0, 1, 1, 0, 1, 1, 1]
"""A prompt, a call of two tokens, a tool's answer, and calls of one and two tokens with nothing between them."""
RANGES = ((0, 2, 4), (1, 5, 6), (2, 6, 8))


def settings_of(**changes: Any) -> TrainerSettings:
    return TrainerSettings.model_validate({"loss": "rloo", "advantage": "mean_centred"} | changes)


def sequence(ranges: tuple[tuple[int, int, int], ...] = RANGES, mask: list[int] = MASK) -> TokenSequence:
    """Calls are named c0, c1, …"""
    return TokenSequence(
        token_ids=list(range(1, len(mask) + 1)),
        loss_mask=mask,
        logprobs=[-1.0 * sampled for sampled in mask],
        weight_versions=[VersionSpan(version=1, start=2, end=len(mask))],
        span_ids=[f"c{number}" for number, _, _ in ranges],
        calls=[CallRange(span_id=f"c{number}", number=number, start=start, end=end) for number, start, end in ranges],
    )


def trajectory(name: str, reward: float, links: dict[str, float], *sequences: TokenSequence) -> Trajectory:
    """`links`: rewards of calls, by their names."""
    given = [TrajectoryReward(reward_id=f"{name}-{s}", name="step", value=v, span_id=s) for s, v in links.items()]
    final = TrajectoryReward(reward_id=f"{name}-final", name="reward", value=reward)
    return Trajectory(
        rollout_id=name,
        status="succeeded",
        reward=reward,
        rewards=[*given, final],
        sequences=list(sequences) or [sequence()],
    )


def trained(settings: TrainerSettings, *group: Trajectory) -> TrainingSet:
    return training_set(Window(1, [[Member(each) for each in group]], []), settings)


def by_token(found: TrainingSet) -> list[list[float]]:
    return [sample.sampled_advantages() for sample in found.samples]


def test_all_tokens_of_a_rollout_get_its_advantage() -> None:
    found = trained(settings_of(), trajectory("a", 1.0, {"c0": 5.0}), trajectory("b", 0.0, {}))
    assert by_token(found) == [[0.5] * 5, [-0.5] * 5]
    assert [sample.advantage for sample in found.samples] == [0.5, -0.5]


def test_sequences_of_a_rollout_share_its_advantage() -> None:
    """It is not divided among them, and counts once in the baseline."""
    both = sequence(((0, 2, 4), (2, 5, 8))), sequence(((1, 2, 4), (3, 5, 8)))
    found = trained(settings_of(), trajectory("a", 1.0, {}, *both), trajectory("b", 0.0, {}))
    assert by_token(found) == [[0.5] * 5, [0.5] * 5, [-0.5] * 5]


def test_discounted_earlier_calls_get_less() -> None:
    settings = settings_of(credit="discounted", credit_discount=0.5)
    found = trained(
        settings, trajectory("a", 1.0, {}), trajectory("b", 0.0, {}, sequence(((0, 2, 8),), [0, 0] + [1] * 6))
    )
    assert by_token(found) == [[0.125, 0.125, 0.25, 0.5, 0.5], [-0.5] * 6]
    packed = pack(found.samples).advantages.tolist()
    assert packed == [0.125, 0.125, 0.25, 0.5, 0.5, *[-0.5] * 6]


def test_each_call_gets_what_it_led_to_among_all_calls_of_the_group() -> None:
    settings = settings_of(credit="call", credit_discount=0.5)
    found = trained(settings, trajectory("a", 1.0, {"c0": 1.0, "c1": -2.0}), trajectory("b", 0.0, {"c2": 4.0}))
    # From the back: 1, -2 + 0.5, 1 - 0.75; and 4, 2, 1.
    expected = mean_centred([0.25, -1.5, 1.0, 1.0, 2.0, 4.0])
    a, b = expected[:3], expected[3:]
    assert by_token(found)[0] == pytest.approx([a[0], a[0], a[1], a[2], a[2]])
    assert by_token(found)[1] == pytest.approx([b[0], b[0], b[1], b[2], b[2]])
    assert [number for sample in found.samples for number in sample.advantages] == pytest.approx(expected)
    assert found.rewards == [1.0, 0.0]


def test_a_final_reward_that_names_its_call_counts_there_and_once() -> None:
    named = trajectory("a", 3.0, {})
    named.rewards[-1].span_id = "c1"
    found = trained(settings_of(credit="call", credit_discount=0.0), named, trajectory("b", 0.0, {}))
    assert [call.reward for call in found.samples[0].calls] == [0.0, 3.0, 0.0]


@given(
    st.floats(-4, 4), st.lists(st.tuples(st.sampled_from(["c0", "c1", "c2", "tool", ""]), st.floats(-2, 2)), max_size=6)
)
def test_parts_of_the_rollouts_reward_stand_at_their_calls_and_once(
    reward: float, parts: list[tuple[str, float]]
) -> None:
    """As an aggregator leaves them: weighed by `counted`, whatever their own value is."""
    whole = trajectory("a", reward, {})
    whole.rewards[:0] = [
        TrajectoryReward(reward_id=str(number), name="compliance", value=-9.0, span_id=span_id, counted=counted)
        for number, (span_id, counted) in enumerate(parts)
    ]
    (calls,) = calls_of(whole, whole.sequences, reward, settings_of(credit="call"))
    assert sum(call.reward for call in calls) == pytest.approx(reward, abs=1e-9)
    for call in calls[:-1]:
        assert call.reward == pytest.approx(sum(c for span_id, c in parts if span_id == f"c{call.number}"), abs=1e-9)


def test_calls_of_several_sequences_are_in_the_order_of_the_rollout() -> None:
    """Two branches that took turns: calls 0 and 2 in one, 1 and 3 in the other."""
    one = sequence(((0, 2, 4), (2, 5, 8)))
    other = sequence(((1, 2, 4), (3, 5, 8)))
    settings = settings_of(credit="discounted", credit_discount=0.5)
    found = trained(settings, trajectory("a", 1.0, {}, one, other), trajectory("b", 0.0, {}))
    assert [sample.advantages for sample in found.samples[:2]] == [(0.0625, 0.25), (0.125, 0.5)]


def test_a_group_is_silent_where_nothing_its_calls_led_to_differs() -> None:
    same = [trajectory(name, 1.0, {"c0": 2.0}) for name in "ab"]
    assert trained(settings_of(credit="rollout"), *same).groups_without_signal == 1
    found = trained(settings_of(credit="call", credit_discount=1.0), *same)
    assert found.groups_without_signal == 0, "a call with 3 to come and one with 1 differ"
    flat = [trajectory(name, 1.0, {}) for name in "ab"]
    assert trained(settings_of(credit="call"), *flat).groups_without_signal == 1


def test_length_costs_the_last_call() -> None:
    changes = {"overlong_buffer_tokens": 4, "overlong_max_tokens": 5, "overlong_penalty": 0.5}
    found = trained(settings_of(credit="call", **changes), trajectory("a", 1.0, {}), trajectory("b", 0.0, {}))
    assert [call.reward for call in found.samples[0].calls] == [0.0, 0.0, 0.5]


def test_records_without_ranges_have_their_runs_of_tokens_as_calls() -> None:
    old = sequence().model_copy(update={"calls": [], "span_ids": ["c0", "c1"]})
    settings = settings_of(credit="call", credit_discount=0.0)
    found = trained(settings, trajectory("a", 1.0, {"c0": 2.0}, old), trajectory("b", 0.0, {}, old))
    assert [(c.start, c.end, c.reward) for c in found.samples[0].calls] == [(2, 4, 2.0), (5, 8, 1.0)]
    merged = sequence().model_copy(update={"calls": []})
    found = trained(settings, trajectory("a", 1.0, {"c0": 2.0}, merged), trajectory("b", 0.0, {}, old))
    assert [(c.start, c.end, c.reward) for c in found.samples[0].calls] == [(2, 4, 0.0), (5, 8, 1.0)]


def test_calls_that_are_not_the_sampled_tokens_are_a_fault() -> None:
    wrong = sequence(((0, 2, 5), (1, 5, 8)))
    member, fault = member_of(trajectory("a", 1.0, {}, wrong), "", ModelLimits(100, 100))
    assert (member.reason, fault) == ("bad_tokens", "its calls are not exactly its sampled tokens")
    for ranges in (((1, 5, 8), (0, 2, 4)), ((0, 2, 4), (1, 2, 4), (2, 7, 8))):
        member, fault = member_of(trajectory("a", 1.0, {}, sequence(ranges)), "", ModelLimits(100, 100))
        assert (member.reason, fault) == ("bad_tokens", "its calls overlap, or are not in the order of their tokens")


@given(
    st.lists(
        st.lists(st.lists(st.floats(-4, 4), min_size=1, max_size=4), min_size=2, max_size=4), min_size=1, max_size=3
    )
)
def test_one_call_a_rollout_or_no_discount_is_the_rollouts_advantage(groups: list[list[list[float]]]) -> None:
    outcomes = [[[Outcome(reward, 2) for reward in calls] for calls in group] for group in groups]
    plain = call_advantages(outcomes, TrainerSettings())
    assert call_advantages(outcomes, TrainerSettings(credit="discounted")) == plain
    for group, found in zip(groups, plain, strict=True):
        expected = group_advantages([sum(calls) for calls in group])
        assert [calls[-1] for calls in found] == pytest.approx(expected)
    for group, found in zip(groups, call_advantages(outcomes, TrainerSettings(credit="call")), strict=True):
        expected = group_advantages([reward for calls in group for reward in span_returns(calls, 1.0)])
        assert [each for calls in found for each in calls] == expected
    single = [[calls[:1] for calls in group] for group in outcomes]
    assert call_advantages(single, TrainerSettings(credit="call")) == call_advantages(single, TrainerSettings())


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=4), st.integers(1, 6), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_a_discount_is_a_power_for_each_call_that_follows(rewards: list[float], calls: int, discount: float) -> None:
    group = [[Outcome(0.0, 1)] * (calls - 1) + [Outcome(reward, 1)] for reward in rewards]
    (found,) = call_advantages([group], TrainerSettings(credit="discounted", credit_discount=discount))
    for own, advantage in zip(found, group_advantages(rewards), strict=True):
        assert own == pytest.approx([advantage * discount ** (calls - 1 - place) for place in range(calls)])


@st.composite
def windows(draw: st.DrawFn) -> list[list[Trajectory]]:
    """Groups some of whose rewards do not differ."""
    groups: list[list[Trajectory]] = []
    for number in range(draw(st.integers(1, 4))):
        size, same = draw(st.integers(2, 4)), draw(st.booleans())
        rewards = [draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0]))] * size
        if not same:
            rewards = [draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0])) for _ in range(size)]
        shapes = [draw(st.sampled_from([RANGES, ((0, 2, 4),), ((0, 2, 4), (1, 5, 8))])) for _ in range(size)]
        sequences = [
            sequence(ranges, [int(any(s <= at < e for _, s, e in ranges)) for at in range(8)]) for ranges in shapes
        ]
        groups.append([trajectory(f"g{number}r{n}", reward, {}, sequences[n]) for n, reward in enumerate(rewards)])
    return groups


@given(
    windows(),
    st.sampled_from(sorted(ESTIMATORS)),
    st.sampled_from([("rollout", 1.0), ("discounted", 0.5), ("call", 0.5)]),
    st.sampled_from(["drop", "keep"]),
    st.lists(st.floats(0, 2), min_size=100, max_size=100),
)
def test_kl_in_reward_compares_with_what_is_compared_without_it(
    groups: list[list[Trajectory]], advantage: str, credit: tuple[str, float], zero_variance: str, kl: list[float]
) -> None:
    """A penalty of 0 changes nothing at all, and another what it changes where every group is trained on."""
    assume(credit[0] != "discounted" or advantage not in BY_TOKEN)  # check_objective refuses it
    changes = {"advantage": advantage, "credit": credit[0], "credit_discount": credit[1]}
    window = Window(1, [[Member(each) for each in group] for group in groups], [])
    in_reward, dropping = {**changes, "kl_in_reward": True}, {"zero_variance": zero_variance}
    plain = training_set(window, settings_of(**changes, **dropping))
    found = training_set(window, settings_of(**in_reward, **dropping))
    everyone = training_set(window, settings_of(**in_reward, zero_variance="keep")).samples
    drawn = iter(kl)
    divergence = {sample.rollout_id: [next(drawn) for _ in range(sum(sample.loss_mask))] for sample in everyone}

    def anew(coefficient: float, samples: list[Sample]) -> list[Sample]:
        own = [divergence[sample.rollout_id] for sample in samples]
        return with_penalties(samples, own, settings_of(**in_reward, kl_coefficient=coefficient))

    for sample, same in zip(anew(0.0, [*found.samples, *found.compared]), plain.samples, strict=False):
        assert sample.rollout_id == same.rollout_id
        assert sample.sampled_advantages() == pytest.approx(same.sampled_advantages(), abs=1e-9)
    expected = {sample.rollout_id: sample for sample in anew(1.0, everyone)}
    for sample in anew(1.0, [*found.samples, *found.compared])[: len(found.samples)]:
        assert sample == expected[sample.rollout_id]


def test_with_kl_in_the_reward_a_token_of_reinforce_plus_plus_answers_for_those_after_it() -> None:
    """Also across calls, in their order; what came before it never counts."""
    settings = settings_of(advantage="batch_normalised", kl_in_reward=True, kl_coefficient=0.5)
    window = Window(
        1, [[Member(trajectory(name, reward, {}, sequence())) for name, reward in (("a", 1), ("b", 0))]], []
    )
    samples = training_set(window, settings).samples
    count = sum(samples[0].loss_mask)
    none, last = [0.0] * count, [0.0] * (count - 1) + [2.0]
    at_the_last = with_penalties(samples, [last, none], settings)
    assert at_the_last[0].sampled_advantages() == pytest.approx([0.0] * count, abs=1e-12)  # 1 - 0.5 * 2: as b has
    first = with_penalties(samples, [[2.0, *none[1:]], none], settings)[0].sampled_advantages()
    assert first[0] < 0.0 < first[1]
    assert first[1:] == [first[1]] * (count - 1)


def test_what_would_be_ignored_is_refused() -> None:
    with pytest.raises(SettingsError, match="rollout gives all calls the same"):
        check_objective(TrainerSettings(credit_discount=0.9))
    with pytest.raises(SettingsError, match="there is no penalty to take from the reward"):
        check_objective(TrainerSettings(kl_in_reward=True))
    for changes in ({"credit": "call"}, {"kl_in_reward": True, "kl_coefficient": 0.1, "model": "m"}):
        with pytest.raises(SettingsError, match="has no advantages that it could change"):
            check_objective(TrainerSettings.model_validate({"loss": "sft"} | changes))

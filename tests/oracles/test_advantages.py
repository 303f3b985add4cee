"""Our advantages and whole recipes, from rewards to gradients, against the libraries' own code."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.advantages import ESTIMATORS as OURS
from fulgurite.streams.objectives.aggregation import token_weights, window_totals
from fulgurite.streams.objectives.credit import span_returns
from fulgurite.streams.objectives.kl import kl_estimate
from fulgurite.streams.objectives.policy_losses import PolicyTokens, policy_loss
from fulgurite.streams.objectives.recipes import POLICY_LOSSES
from fulgurite.streams.objectives.rewards import overlong_penalty
from fulgurite.streams.trainer.credit import Outcome, call_advantages, with_penalties
from fulgurite.streams.trainer.sample import Call, Sample
from tests.oracles.case import GROUP, LENGTHS, Case, cases
from tests.oracles.comparison import compare_losses, compare_values
from tests.oracles.estimators import ESTIMATORS, PENALISED
from tests.oracles.libraries import LIBRARIES, Asked
from tests.oracles.standins import load

pytestmark = pytest.mark.oracles

COMPARED = {
    "group_normalised": "verl skyrl openrlhf areal",
    "mean_centred": "verl skyrl openrlhf areal",
    "leave_one_out": "verl skyrl openrlhf areal",
    "batch_normalised": "verl skyrl openrlhf",
    "group_mean_batch_normalised": "verl openrlhf",
}
RECIPES = {
    "rloo": "verl skyrl openrlhf",
    "reinforce_plus_plus": "verl skyrl openrlhf",
    "reinforce_plus_plus_baseline": "verl openrlhf",
}


def our_advantages(case: Case, name: str) -> Tensor:
    counts = case.sequences.lengths.view(-1, GROUP).tolist()
    return torch.tensor(OURS[name](case.groups, counts), dtype=torch.float64).flatten()


def prepared(library: str, name: str) -> list[Case]:
    """SkyRL's REINFORCE++ starts anew after each gap; elsewhere gaps stay."""
    found = cases()
    return [case.without_gaps() for case in found] if (library, name) == ("skyrl", "batch_normalised") else found


@pytest.mark.parametrize(
    ("name", "library"), [(name, library) for name, names in COMPARED.items() for library in names.split()]
)
def test_advantages(name: str, library: str) -> None:
    compare_values(
        f"advantage {name}",
        library,
        (
            (case.sequences.spread(our_advantages(case, name)), case.packed(ESTIMATORS[library](case, name)))
            for case in prepared(library, name)
        ),
    )


@pytest.mark.parametrize(
    ("name", "library"), [(name, library) for name, names in RECIPES.items() for library in names.split()]
)
def test_from_rewards_to_gradients(name: str, library: str) -> None:
    recipe = POLICY_LOSSES[name]

    def ours(case: Case) -> Tensor:
        advantages = case.sequences.spread(our_advantages(case, recipe.advantage))
        weights = token_weights("token_mean", case.sequences, window_totals(LENGTHS), dtype=torch.float64)
        tokens = PolicyTokens(case.logprobs, case.proximal, advantages, case.sequences)
        return policy_loss(name, tokens, weights)[0]

    def theirs(case: Case) -> Tensor:
        table = ESTIMATORS[library](case, recipe.advantage)
        last = case.sequences.lengths.cumsum(0) - 1
        told = replace(case, advantages=case.packed(table)[last])
        return LIBRARIES[library](told, Asked("clipped", "token_mean", recipe.clip.low, recipe.clip.high))

    compare_losses(name, library, ours, theirs, prepared(library, recipe.advantage))


def discounted(case: Case, discount: float) -> Tensor:
    """The trainer's credit, with each token a call of its own: they discount from token to token."""
    settings = TrainerSettings(loss="rloo", credit="discounted", credit_discount=discount)
    rollouts = [
        [Outcome(0.0, 1)] * (length - 1) + [Outcome(reward, 1)]
        for length, reward in zip(LENGTHS, case.rewards.tolist(), strict=True)
    ]
    groups = [rollouts[at : at + GROUP] for at in range(0, len(rollouts), GROUP)]
    found = call_advantages(groups, settings)
    return torch.tensor([value for group in found for calls in group for value in calls], dtype=torch.float64)


def test_discounted_credit() -> None:
    """Theirs are returns of what they are given at the end: here the advantages that we discount."""
    algorithms = load("verl.trainer.ppo.core_algos")
    maker = load("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker

    def at_the_end(case: Case) -> Tensor:
        last = case.sequences.lengths.cumsum(0) - 1
        return case.padded(
            torch.zeros(len(case.columns), dtype=torch.float64).index_put(
                (last,), our_advantages(case, "leave_one_out")
            )
        )

    def of_verl(case: Case) -> Tensor:
        estimate = algorithms.get_adv_estimator_fn("reinforce_plus_plus")
        return estimate(at_the_end(case), case.mask, config=SimpleNamespace(gamma=0.9))[1]

    def of_openrlhf(case: Case) -> Tensor:
        return maker.get_cumulative_returns(None, at_the_end(case), case.mask, 0.9)

    compare_values("discounted credit", "verl", ((discounted(c, 0.9), c.packed(of_verl(c))) for c in cases()))
    # OpenRLHF discounts over gaps too.
    dense = [case.without_gaps() for case in cases()]
    compare_values("discounted credit", "openrlhf", ((discounted(c, 0.9), c.packed(of_openrlhf(c))) for c in dense))


@pytest.mark.parametrize("library", ["verl", "openrlhf"])
def test_returns_of_calls_with_rewards_of_their_own(library: str) -> None:
    """Each token a call of its own: every one has a reward, each what it led to."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for case in (case.without_gaps() for case in cases()):
        rewards = case.behaviour.split(LENGTHS)
        ours = [value for own in rewards for value in span_returns(own.tolist(), 0.9)]
        table = case.padded(case.behaviour)
        if library == "verl":
            estimate = load("verl.trainer.ppo.core_algos").get_adv_estimator_fn("reinforce_plus_plus")
            theirs = estimate(table, case.mask, config=SimpleNamespace(gamma=0.9))[1]
        else:
            maker = load("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
            theirs = maker.get_cumulative_returns(None, table, case.mask, 0.9)
        pairs.append((torch.tensor(ours, dtype=torch.float64), case.packed(theirs)))
    compare_values("span returns", library, pairs)


def with_kl(case: Case, coefficient: float) -> tuple[Tensor, Tensor]:
    """k1 of each token [N], and the trainer's advantages [N] of what REINFORCE++ leaves of the rewards."""
    kl = kl_estimate(case.behaviour, case.reference, "k1")
    settings = TrainerSettings(loss="reinforce_plus_plus", kl_in_reward=True, kl_coefficient=coefficient)
    by_sequence = [part.tolist() for part in kl.split(LENGTHS)]
    samples = [
        Sample(str(row), [0] * (n + 1), [0] + [1] * n, [], [], 0.0, row // GROUP, (Call(1, n + 1, 0, reward),))
        for row, (n, reward) in enumerate(zip(LENGTHS, case.rewards.tolist(), strict=True))
    ]
    found = with_penalties(samples, by_sequence, settings)
    return kl, torch.tensor([value for sample in found for value in sample.sampled_advantages()], dtype=torch.float64)


@pytest.mark.parametrize("library", ["verl", "skyrl", "openrlhf"])
def test_kl_in_the_reward_of_reinforce_plus_plus(library: str) -> None:
    """From rewards and log p to advantages of tokens, each answering for its own penalty and those after it."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for case in prepared(library, "batch_normalised"):
        kl, ours = with_kl(case, 0.3)
        pairs.append((ours, case.packed(PENALISED[library](case, case.padded(kl), 0.3))))
    compare_values("reinforce_plus_plus, kl", library, pairs)


def test_span_returns() -> None:
    """AReaL's cache of calls, newest last; a call without a reward counts as 0."""
    rewards = [0.5, 0.0, -1.0, 2.0]
    cache = load("areal.experimental.openai.cache").InteractionCache()
    for number, reward in enumerate(rewards):
        OrderedDict.__setitem__(cache, str(number), SimpleNamespace(reward=reward))
    cache.apply_reward_discount(0.9)
    found = [call.reward for call in cache.values()]
    compare_values("span returns", "areal", [(torch.tensor(span_returns(rewards, 0.9)), torch.tensor(found))])


def test_overlong_penalty() -> None:
    lengths = torch.tensor([1, 80, 81, 95, 100])
    ours = torch.tensor([overlong_penalty(n, max_length=100, buffer=20, factor=0.5) for n in lengths.tolist()])
    experience = SimpleNamespace(rewards=torch.zeros(5), response_length=lengths)
    load("openrlhf.trainer.ppo_utils.length_penalty").apply_overlong_penalty([experience], 100, 20, 0.5)
    compare_values("overlong penalty", "openrlhf", [(ours, experience.rewards)])
    data = {
        "rewards": torch.zeros(5),
        "input_ids": torch.zeros((5, 100)),
        "loss_mask": torch.arange(100).unsqueeze(0) < lengths.unsqueeze(1),
    }
    found = load("areal.utils.functional.functional").reward_overlong_penalty(data, 20, 0.5, 100)
    compare_values("overlong penalty", "areal", [(ours, found["rewards"])])

"""Our KL estimates against the libraries' own: values and gradients, and what they leave of rewards."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fulgurite.streams.objectives.kl import Estimator, kl_estimate
from fulgurite.streams.objectives.rewards import penalised_rewards
from tests.oracles.case import LENGTHS, Case, cases
from tests.oracles.comparison import compare_losses, compare_values
from tests.oracles.standins import load

pytestmark = pytest.mark.oracles


def verl(case: Case, estimator: Estimator) -> Tensor:
    return load("verl.trainer.ppo.core_algos").kl_penalty(case.logprobs, case.reference, estimator)


def areal(case: Case, estimator: Estimator) -> Tensor:
    return load("areal.utils.data").KLEstimator(estimator)(case.logprobs, case.reference)


def openrlhf(case: Case, estimator: Estimator) -> Tensor:
    return load("openrlhf.models.utils").compute_approx_kl(case.logprobs, case.reference, kl_estimator=estimator)


def skyrl(case: Case, estimator: Estimator) -> Tensor:
    module = load("skyrl.backends.skyrl_train.utils.ppo_utils")
    return module.compute_approx_kl(case.logprobs, case.reference, kl_estimator_type=estimator)


LIBRARIES: dict[str, Callable[[Case, Estimator], Tensor]] = {
    "verl": verl,
    "areal": areal,
    "openrlhf": openrlhf,
    "skyrl": skyrl,
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_value_and_gradient(estimator: Estimator, library: str) -> None:
    def weighed(estimates: Tensor) -> Tensor:
        """A sum in which every token has another weight, so that no difference cancels."""
        return (estimates * torch.linspace(0.5, 1.5, len(estimates))).mean()

    compare_losses(
        f"kl {estimator}",
        library,
        lambda case: weighed(kl_estimate(case.logprobs, case.reference, estimator)),
        lambda case: weighed(LIBRARIES[library](case, estimator)),
        cases()[1:4],  # at a deviation of 0 there is nothing, and far off they clamp values to 10
    )


COEFFICIENT = 0.3


def in_the_reward_of_verl(case: Case, estimator: Estimator) -> Tensor:
    """[S, T] rewards of tokens."""
    batch = {
        "response_mask": case.mask,
        "token_level_scores": _at_the_end(case),
        "old_log_probs": case.padded(case.behaviour),
        "ref_log_prob": case.padded(case.reference),
    }
    data = SimpleNamespace(batch=_Batch(batch))
    control = SimpleNamespace(value=COEFFICIENT, update=lambda **_: None)
    found, _ = load("verl.trainer.ppo.ray_trainer").apply_kl_penalty(data, control, estimator)
    return found.batch["token_level_rewards"]


def in_the_reward_of_openrlhf(case: Case, estimator: Estimator) -> Tensor:
    module = load("openrlhf.models.utils")
    kl = module.compute_approx_kl(case.behaviour, case.reference, kl_estimator=estimator)
    return module.compute_reward(case.rewards, COEFFICIENT, case.padded(kl), case.mask)


class _Batch(dict[str, Tensor]):
    @property
    def batch_size(self) -> tuple[int]:
        return (len(self["response_mask"]),)


def _at_the_end(case: Case) -> Tensor:
    last = case.sequences.lengths.cumsum(0) - 1
    return case.padded(torch.zeros(len(case.columns), dtype=torch.float64).index_put((last,), case.rewards))


IN_THE_REWARD: dict[str, Callable[[Case, Estimator], Tensor]] = {
    "verl": in_the_reward_of_verl,
    "openrlhf": in_the_reward_of_openrlhf,
}


@pytest.mark.parametrize("library", IN_THE_REWARD)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_in_the_reward(estimator: Estimator, library: str) -> None:
    """They place it at tokens; what a rollout has left is their sum."""

    def ours(case: Case) -> Tensor:
        kl = kl_estimate(case.behaviour, case.reference, estimator).split(list(LENGTHS))
        sums = [sum(own.tolist()) for own in kl]
        return torch.tensor(penalised_rewards(case.rewards.tolist(), sums, COEFFICIENT), dtype=torch.float64)

    compare_values(
        f"kl in the reward {estimator}",
        library,
        # Far off they clamp values to 10.
        ((ours(case), IN_THE_REWARD[library](case, estimator).sum(1)) for case in cases()[1:4]),
    )

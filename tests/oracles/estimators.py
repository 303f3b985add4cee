"""The libraries' advantage estimators behind one signature: a case's rewards -> a table [S, T] of tokens' advantages.

Each function only arranges arguments; what is computed is the library's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.oracles.case import GROUP, Case
from tests.oracles.standins import load

Estimator = Callable[[Case, str], Tensor]


def _rewards_at_the_end(case: Case) -> Tensor:
    """[S, T]: each sequence's reward at its last sampled token."""
    last = case.sequences.lengths.cumsum(0) - 1
    return case.padded(torch.zeros(len(case.columns), dtype=torch.float64).index_put((last,), case.rewards))


def _group_of_sequence(case: Case) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]:
    return numpy.arange(len(case.rewards)) // GROUP


def verl(case: Case, name: str, penalties: Tensor | float = 0.0) -> Tensor:
    algorithms = load("verl.trainer.ppo.core_algos")
    estimator = {
        "group_normalised": "grpo",
        "mean_centred": "grpo",
        "leave_one_out": "rloo",
        "batch_normalised": "reinforce_plus_plus",
        "group_mean_batch_normalised": "reinforce_plus_plus_baseline",
    }[name]
    options: dict[str, Any] = {} if estimator == "reinforce_plus_plus" else {"index": _group_of_sequence(case)}
    if estimator == "grpo":
        options["norm_adv_by_std_in_grpo"] = name == "group_normalised"
    advantages, _ = algorithms.get_adv_estimator_fn(estimator)(
        _rewards_at_the_end(case) - penalties, case.mask, config=SimpleNamespace(gamma=1.0), **options
    )
    return advantages


def skyrl(case: Case, name: str, penalties: Tensor | float = 0.0) -> Tensor:
    module = load("skyrl.backends.skyrl_train.utils.ppo_utils")
    estimator = {
        "group_normalised": "grpo",
        "mean_centred": "grpo",
        "leave_one_out": "rloo",
        "batch_normalised": "reinforce++",
    }[name]
    advantages, _ = module.AdvantageEstimatorRegistry.get(estimator)(
        token_level_rewards=_rewards_at_the_end(case) - penalties,
        response_mask=case.mask,
        index=_group_of_sequence(case),
        gamma=1.0,
        grpo_norm_by_std=name == "group_normalised",
    )
    return advantages


def openrlhf(case: Case, name: str, gamma: float = 1.0, kl: Tensor | None = None, coefficient: float = 0.0) -> Tensor:
    """By the method of its experience maker, whose state it reads is only settings."""
    estimator = {
        "group_normalised": "group_norm",
        "mean_centred": "dr_grpo",
        "leave_one_out": "rloo",
        "batch_normalised": "reinforce",
        "group_mean_batch_normalised": "reinforce_baseline",
    }[name]
    module = load("openrlhf.trainer.ppo_utils.experience_maker")
    maker = object.__new__(module.RemoteExperienceMaker)
    maker.advantage_estimator = estimator
    maker.kl_ctl = SimpleNamespace(value=coefficient)
    maker.strategy = SimpleNamespace(
        args=SimpleNamespace(
            algo=SimpleNamespace(advantage=SimpleNamespace(estimator=estimator, gamma=gamma, no_std_norm=False)),
            reward=SimpleNamespace(clip_range=None),
            rollout=SimpleNamespace(n_samples_per_prompt=GROUP),
        )
    )
    experience = SimpleNamespace(
        index=list(range(len(case.rewards))),
        rewards=case.rewards,
        kl=torch.zeros_like(case.mask, dtype=torch.float64) if kl is None else kl,
        action_mask=case.mask,
        info={},
    )
    (found,) = maker.compute_advantages_and_returns([experience])
    advantages = found.advantages
    if name in ("batch_normalised", "group_mean_batch_normalised"):
        # Its variance is divided by n, not n - 1: the documented difference, taken out.
        tokens = len(case.columns)
        advantages = advantages * ((tokens - 1) / tokens) ** 0.5
    return advantages


def areal(case: Case, name: str) -> Tensor:
    config = load("areal.api.cli_args").NormConfig(
        mean_level="group",
        mean_leave1out=name == "leave_one_out",
        std_level="group" if name == "group_normalised" else None,
        eps=1e-6,
        group_size=GROUP,
    )
    normalised = load("areal.utils.data").Normalization(config)(case.rewards)
    return case.padded(case.sequences.spread(normalised))


def _verl_penalised(case: Case, kl: Tensor, coefficient: float) -> Tensor:
    return verl(case, "batch_normalised", coefficient * kl)


def _skyrl_penalised(case: Case, kl: Tensor, coefficient: float) -> Tensor:
    return skyrl(case, "batch_normalised", coefficient * kl)


def _openrlhf_penalised(case: Case, kl: Tensor, coefficient: float) -> Tensor:
    return openrlhf(case, "batch_normalised", kl=kl, coefficient=coefficient)


PENALISED: dict[str, Callable[[Case, Tensor, float], Tensor]] = {
    "verl": _verl_penalised,
    "skyrl": _skyrl_penalised,
    "openrlhf": _openrlhf_penalised,
}
"""REINFORCE++ with a table of KL estimates in the reward; verl and SkyRL are given rewards of tokens that have paid."""

ESTIMATORS: dict[str, Estimator] = {"verl": verl, "skyrl": skyrl, "openrlhf": openrlhf, "areal": areal}

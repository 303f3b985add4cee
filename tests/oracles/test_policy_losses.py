"""Our policy losses against the libraries' own code: values and gradients, on ragged sequences with gaps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fulgurite.streams.objectives.aggregation import token_weights, window_totals
from fulgurite.streams.objectives.entropy import entropy_loss
from fulgurite.streams.objectives.importance import importance_weights
from fulgurite.streams.objectives.kl import kl_penalty
from fulgurite.streams.objectives.policy_losses import PolicyTokens, cispo, clipped, policy_loss, sequence_clipped
from fulgurite.streams.objectives.recipes import Clip
from tests.oracles.case import LENGTHS, Case, cases
from tests.oracles.comparison import compare_losses
from tests.oracles.libraries import CONSTANT, LIBRARIES, Asked, Correction, skyrl_correction
from tests.oracles.standins import load

pytestmark = pytest.mark.oracles

SURROGATES = {"clipped": clipped, "gspo": sequence_clipped, "cispo": cispo}

PPO = Asked("clipped", "token_mean", 0.2, 0.2)
COMPARED: dict[str, tuple[Asked, str]] = {
    "grpo": (Asked("clipped", "sequence_mean", 0.2, 0.2), "verl trl liger openrlhf skyrl swift"),
    "dr_grpo": (Asked("clipped", "sequence_sum", 0.2, 0.2), "verl trl liger skyrl swift"),
    "dapo": (Asked("clipped", "token_mean", 0.2, 0.28), "verl trl liger openrlhf areal skyrl swift"),
    "gspo": (Asked("gspo", "sequence_mean", 0.1, 0.15), "verl trl liger openrlhf skyrl swift"),
    "gspo, token mean": (Asked("gspo", "token_mean", 0.1, 0.15), "verl areal skyrl"),
    "cispo": (Asked("cispo", "token_mean", 1.0, 0.5), "verl trl liger skyrl swift"),
    "cispo with a lower bound": (Asked("cispo", "token_mean", 0.3, 0.5), "verl skyrl"),
    "ppo": (PPO, "verl trl liger openrlhf areal skyrl swift"),
    "ppo_dual_clip": (Asked("clipped", "token_mean", 0.2, 0.2, dual=1.5), "verl trl liger openrlhf areal skyrl"),
    "decoupled, token truncated": (
        Asked("clipped", "token_mean", 0.2, 0.28, correction=Correction("truncate", 1.5)),
        "verl openrlhf areal skyrl swift",
    ),
    "decoupled, token clamped": (
        Asked("clipped", "token_mean", 0.2, 0.28, correction=Correction("truncate", 1.5, low=0.7)),
        "openrlhf areal",
    ),
    "decoupled, token masked": (
        Asked("clipped", "token_mean", 0.2, 0.28, correction=Correction("mask", 1.5, low=0.7)),
        "verl openrlhf areal skyrl",
    ),
    "decoupled, product truncated": (
        Asked("clipped", "sequence_mean", 0.2, 0.2, correction=Correction("truncate", 2.0, level="sequence_product")),
        "verl skyrl",
    ),
    "decoupled, product masked": (
        Asked("clipped", "token_mean", 0.2, 0.2, correction=Correction("mask", 2.0, 0.5, level="sequence_product")),
        "verl skyrl",
    ),
    "decoupled, mean truncated": (
        Asked("clipped", "token_mean", 0.2, 0.2, correction=Correction("truncate", 1.2, level="sequence_mean")),
        "areal swift",
    ),
    "decoupled, mean masked": (
        Asked("clipped", "token_mean", 0.2, 0.2, correction=Correction("mask", 1.5, 0.6, level="sequence_mean")),
        "areal openrlhf skyrl",  # the last two with ms-swift's means
    ),
    "decoupled, mean gates tokens": (
        Asked("clipped", "token_mean", 0.2, 0.2, correction=Correction("mask", 1.5, 0.6, gate="sequence_mean")),
        "openrlhf skyrl",
    ),
    "decoupled, mean gates tokens from above": (
        Asked("clipped", "token_mean", 0.2, 0.2, correction=Correction("mask", 1.5, gate="sequence_mean")),
        "openrlhf skyrl swift",
    ),
    "grpo + k3": (Asked("clipped", "sequence_mean", 0.2, 0.2, kl=0.1), "verl trl liger openrlhf swift"),
    "grpo + k3, gradient of k2": (
        Asked("clipped", "sequence_mean", 0.2, 0.2, kl=0.1, kl_gradient="k2"),
        "verl openrlhf",
    ),
    "grpo + k3 x ratio": (Asked("clipped", "sequence_mean", 0.2, 0.2, kl=0.1, kl_gradient="ratio"), "trl liger"),
    "dapo + entropy": (Asked("clipped", "token_mean", 0.2, 0.28, entropy=0.05), "verl trl"),
}


def ours(case: Case, asked: Asked) -> Tensor:
    tokens = PolicyTokens(case.logprobs, case.proximal, case.token_advantages, case.sequences)
    losses = SURROGATES[asked.kind](tokens, Clip(asked.low, asked.high, asked.dual)).losses
    if asked.correction is not None:
        correction = asked.correction
        losses = losses * importance_weights(
            case.proximal, case.behaviour, case.sequences, mode=correction.mode,
            high=correction.high, low=correction.low, level=correction.level, gate=correction.gate,
        ).weights  # fmt: skip
    if asked.kl:
        penalty = kl_penalty(case.logprobs, case.reference, "k3", asked.kl_gradient, old_logprobs=case.proximal)
        losses = losses + asked.kl * penalty
    weights = token_weights(
        asked.aggregation, case.sequences, window_totals(LENGTHS), constant=CONSTANT, dtype=torch.float64
    )
    return (weights * losses).sum() + entropy_loss(case.logprobs.square(), weights, asked.entropy)


@pytest.mark.parametrize(
    ("quantity", "library"), [(name, library) for name, (_, names) in COMPARED.items() for library in names.split()]
)
def test_value_and_gradient(quantity: str, library: str) -> None:
    asked, _ = COMPARED[quantity]
    compare_losses(
        quantity,
        library,
        lambda case: ours(case, asked),
        lambda case: LIBRARIES[library](case, asked),
        cases()[:4] if asked.kl else cases(),  # verl and OpenRLHF clamp k3 at 10
    )


def reinforce_of_verl(case: Case) -> Tensor:
    current = case.logprobs.detach()
    weights, _ = load("verl.trainer.ppo.rollout_corr_helper").compute_rollout_correction_weights(
        case.padded(current - case.behaviour), case.mask, rollout_is="token", rollout_is_threshold="0.4_2.5"
    )
    loss, _ = load("verl.trainer.ppo.core_algos").compute_policy_loss_reinforce(
        case.padded(case.behaviour), case.padded(case.logprobs), case.padded(case.token_advantages), case.mask,
        "token-mean", SimpleNamespace(global_batch_info={}), weights,
    )  # fmt: skip
    return loss


def reinforce_of_skyrl(case: Case) -> Tensor:
    module = load("skyrl.backends.skyrl_train.utils.ppo_utils")
    config = SimpleNamespace(eps_clip_low=0.6, eps_clip_high=1.5, off_policy_correction=skyrl_correction(None))
    loss, _ = module.PolicyLossRegistry.get("rollout_is")(
        case.padded(case.logprobs), case.padded(case.proximal), case.padded(case.token_advantages) / case.mask.sum(),
        config, loss_mask=case.mask, rollout_logprobs=case.padded(case.behaviour),
    )  # fmt: skip
    return loss


@pytest.mark.parametrize(("library", "theirs"), [("verl", reinforce_of_verl), ("skyrl", reinforce_of_skyrl)])
def test_reinforce_under_masked_weights(library: str, theirs: Callable[[Case], Tensor]) -> None:
    """The ratio only weighs, and is of the current policy."""

    def ours_masked(case: Case) -> Tensor:
        found = importance_weights(case.logprobs, case.behaviour, case.sequences, mode="mask", low=0.4, high=2.5)
        tokens = PolicyTokens(case.logprobs, case.logprobs.detach(), case.token_advantages, case.sequences)
        weights = token_weights("token_mean", case.sequences, window_totals(LENGTHS), dtype=torch.float64)
        return policy_loss("reinforce", tokens, weights, found.weights)[0]

    compare_losses("reinforce, token masked", library, ours_masked, theirs, cases())

"""The loss of a micro-batch against token-by-token derivations in plain Python: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.aggregation import token_weights, window_totals
from fulgurite.streams.objectives.importance import importance_weights
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.policy_losses import PolicyTokens, policy_loss
from fulgurite.streams.objectives.ratios import MAX_LOG_RATIO
from fulgurite.streams.trainer.losses import LossTerms, ScoredTokens, behaviour_kl, micro_batch_loss

LOW, HIGH, CAP = 0.2, 0.28, 2.0
"""Those of dapo, and the default of trainer.importance_cap."""
logprob = st.floats(-6, -1e-3)
token = st.tuples(logprob, logprob, logprob, st.floats(-3, 3))


def one_sequence(count: int) -> Sequences:
    return Sequences.from_lengths(torch.tensor([count]))


def loss_of(
    current: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    *,
    entropies: Tensor | None = None,
    reference: Tensor | None = None,
    tokens: int = 0,
    **changes: Any,
) -> LossTerms:
    """All of one sequence, in a window of `tokens` (0: of these)."""
    count = len(current)
    scored = ScoredTokens(
        current,
        torch.zeros_like(current) if entropies is None else entropies,
        behaviour,
        advantages,
        one_sequence(count),
        reference,
    )
    return micro_batch_loss(TrainerSettings.model_validate(changes), scored, window_totals([tokens or count]))


def by_hand(tokens: list[tuple[float, float, float, float]]) -> tuple[float, list[float]]:
    """Loss and d loss / d logprob of (current, proximal, behaviour, advantage), case by case."""
    loss, gradients = 0.0, list[float]()
    for current, proximal, behaviour, advantage in tokens:
        weight = min(math.exp(proximal - behaviour), CAP)
        ratio = math.exp(current - proximal)
        if advantage >= 0:
            free = ratio <= 1 + HIGH
            term = min(ratio, 1 + HIGH) * advantage
        else:
            free = ratio >= 1 - LOW
            term = max(ratio, 1 - LOW) * advantage
        loss -= weight * term / len(tokens)
        gradients.append(-weight * ratio * advantage / len(tokens) if free else 0.0)
    return loss, gradients


@settings(deadline=None, max_examples=200)
@given(st.lists(token, min_size=1, max_size=20))
def test_decoupled_dapo_is_as_derived(tokens: list[tuple[float, float, float, float]]) -> None:
    current, proximal, behaviour, advantages = torch.tensor(tokens, dtype=torch.float64).T
    # At the very edge of the clip both gradients are right: stay away from it.
    ratios = (current - proximal).exp()
    if any(((ratios - edge).abs() < 1e-6).any() for edge in (1 - LOW, 1 + HIGH)):
        return
    current = current.clone().requires_grad_()
    sequences = one_sequence(len(tokens))
    weights = token_weights("token_mean", sequences, window_totals([len(tokens)]), dtype=torch.float64)
    capped = importance_weights(proximal, behaviour, sequences, mode="truncate", high=CAP).weights
    found, _ = policy_loss("dapo", PolicyTokens(current, proximal, advantages, sequences), weights, capped)
    found.backward()
    loss, gradients = by_hand(tokens)
    assert current.grad is not None
    assert found.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert current.grad.tolist() == pytest.approx(gradients, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(token, min_size=1, max_size=12), st.sampled_from(["clip", "truncate"]))
def test_which_policy_is_the_proximal_one_follows_from_the_correction(
    tokens: list[tuple[float, float, float, float]], correction: str
) -> None:
    current, _, behaviour, advantages = torch.tensor(tokens, dtype=torch.float64).T
    ratios = (current - behaviour).exp()
    if any(((ratios - edge).abs() < 1e-6).any() for edge in (1 - LOW, 1 + HIGH)):
        return
    current = current.clone().requires_grad_()
    terms = loss_of(current, behaviour, advantages, correction=correction)
    terms.loss.backward()
    loss, gradients = by_hand(
        [(now, then if correction == "clip" else now, then, advantage) for now, _, then, advantage in tokens]
    )
    assert current.grad is not None
    assert terms.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert current.grad.tolist() == pytest.approx(gradients, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("correction", ["clip", "truncate", "mask", "none"])
def test_on_policy_it_is_reinforce(correction: str) -> None:
    current = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    terms = loss_of(current, current.detach(), advantages, correction=correction)
    terms.loss.backward()
    assert current.grad is not None
    assert current.grad.tolist() == pytest.approx((-advantages / 3).tolist())
    assert not terms.clipped.any()
    assert not terms.held.any()


def test_clip_is_higher_above_than_below() -> None:
    for ratio, advantage, clipped in ((1.25, 1.0, False), (1.30, 1.0, True), (0.85, -1.0, False), (0.75, -1.0, True)):
        behaviour = torch.tensor([-1.0])
        terms = loss_of(behaviour + math.log(ratio), behaviour, torch.tensor([advantage]))
        assert terms.clipped.item() is clipped, (ratio, advantage)


@pytest.mark.parametrize(
    ("changes", "weights", "held"),
    [
        ({"correction": "truncate"}, [2.0, 1.0, math.exp(-2)], [True, False, False]),
        ({"correction": "truncate", "importance_low": 0.5}, [2.0, 1.0, 0.5], [True, False, True]),
        ({"correction": "mask", "importance_low": 0.5}, [0.0, 1.0, 0.0], [True, False, True]),
        ({"correction": "mask", "importance_low": 0.5, "importance_gate": "sequence_mean"}, None, [False] * 3),
        ({"correction": "truncate", "importance_level": "sequence_mean"}, [1.0] * 3, [False] * 3),
        ({"correction": "none"}, [1.0] * 3, [False] * 3),
    ],
)
def test_importance_weights_are_bounded_as_asked(
    changes: dict[str, Any], weights: list[float] | None, held: list[bool]
) -> None:
    behaviour = torch.tensor([-3.0, -1.0, -1.0])
    now = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    terms = loss_of(now, behaviour, torch.ones(3), **changes)
    terms.loss.backward()
    expected = [math.exp(2), 1.0, math.exp(-2)] if weights is None else weights
    assert now.grad is not None
    assert terms.ratios.tolist() == pytest.approx(expected)
    assert now.grad.tolist() == pytest.approx([-weight / 3 for weight in expected])
    assert terms.held.tolist() == held


def test_penalty_and_bonus_are_weighed_like_the_loss_but_not_by_importance() -> None:
    """k3 with its own gradient is 1 - p_ref / p; a masked token still has it."""
    now = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([-1.0, -9.0], dtype=torch.float64)
    reference = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    terms = loss_of(
        now, behaviour, torch.zeros(2, dtype=torch.float64), entropies=entropies, reference=reference, tokens=10,
        correction="mask", kl_coefficient=0.3, entropy_coefficient=0.2,
    )  # fmt: skip
    terms.loss.backward()
    k3 = [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1]
    assert terms.kl is not None
    assert now.grad is not None
    assert entropies.grad is not None
    assert terms.held.tolist() == [False, True]
    assert terms.kl.tolist() == pytest.approx(k3)
    assert terms.loss.item() == pytest.approx((0.3 * sum(k3) - 0.2 * 1.2) / 10)
    assert now.grad.tolist() == pytest.approx([0.03 * (1 - math.exp(-0.5)), 0.03 * (1 - math.e)])
    assert entropies.grad.tolist() == pytest.approx([-0.02, -0.02])


def test_an_absurd_ratio_stays_finite() -> None:
    terms = loss_of(torch.tensor([-1e-3]), torch.tensor([-500.0]), torch.tensor([-1.0]))
    assert math.isfinite(terms.loss.item())
    assert math.exp(MAX_LOG_RATIO) < torch.finfo(torch.float32).max


def test_micro_batches_add_up_to_the_window() -> None:
    torch.manual_seed(0)
    now, behaviour, advantages = -torch.rand(10), -torch.rand(10), torch.randn(10)

    def loss(part: slice) -> float:
        return loss_of(now[part], behaviour[part], advantages[part], tokens=10, correction="truncate").loss.item()

    assert loss(slice(0, 3)) + loss(slice(3, 10)) == pytest.approx(loss(slice(0, 10)), rel=1e-5)


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    """Expectations over all tokens, weighted as the behaviour policy samples them, are the KL itself."""
    behaviour, current = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (behaviour * (behaviour.log() - current.log())).sum().item()
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    k1, k3 = behaviour_kl(current.log()[drawn], behaviour.log()[drawn])
    assert k1 == pytest.approx(exact, abs=1e-6)
    assert k3 == pytest.approx(exact, abs=1e-6)

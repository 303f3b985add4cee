"""The loss against a token-by-token derivation in plain Python: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.streams.objectives.ratios import MAX_LOG_RATIO
from fulgurite.streams.trainer.losses import behaviour_kl, policy_loss

LOW, HIGH, CAP = 0.2, 0.28, 2.0
logprob = st.floats(-6, -1e-3)
token = st.tuples(logprob, logprob, logprob, st.floats(-3, 3))


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
def test_value_and_gradient_agree_with_the_derivation(tokens: list[tuple[float, float, float, float]]) -> None:
    current, proximal, behaviour, advantages = torch.tensor(tokens, dtype=torch.float64).T
    # At the very edge of the clip both gradients are right: stay away from it.
    ratios = (current - proximal).exp()
    if any(((ratios - edge).abs() < 1e-6).any() for edge in (1 - LOW, 1 + HIGH)):
        return
    current = current.clone().requires_grad_()
    terms = policy_loss(
        current, proximal, behaviour, advantages,
        token_count=len(tokens), clip_low=LOW, clip_high=HIGH, importance_cap=CAP,
    )  # fmt: skip
    terms.loss.backward()
    loss, gradients = by_hand(tokens)
    assert current.grad is not None
    assert terms.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert current.grad.tolist() == pytest.approx(gradients, rel=1e-9, abs=1e-12)


def test_on_policy_it_is_reinforce() -> None:
    current = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    terms = policy_loss(
        current, current.detach(), current.detach(), advantages,
        token_count=3, clip_low=LOW, clip_high=HIGH, importance_cap=CAP,
    )  # fmt: skip
    terms.loss.backward()
    assert current.grad is not None
    assert current.grad.tolist() == pytest.approx((-advantages / 3).tolist())
    assert not terms.clipped.any()
    assert not terms.capped.any()


def test_clip_is_higher_above_than_below() -> None:
    for ratio, advantage, clipped in ((1.25, 1.0, False), (1.30, 1.0, True), (0.85, -1.0, False), (0.75, -1.0, True)):
        proximal = torch.tensor([-1.0])
        terms = policy_loss(
            proximal + math.log(ratio), proximal, proximal, torch.tensor([advantage]),
            token_count=1, clip_low=LOW, clip_high=HIGH, importance_cap=CAP,
        )  # fmt: skip
        assert terms.clipped.item() is clipped, (ratio, advantage)


def test_importance_weight_is_capped_but_not_from_below() -> None:
    behaviour = torch.tensor([-3.0, -1.0, -1.0])
    now = torch.tensor([-1.0, -1.0, -3.0])
    terms = policy_loss(
        now, now, behaviour, torch.ones(3), token_count=3, clip_low=LOW, clip_high=HIGH, importance_cap=CAP
    )
    assert terms.importance_weights.tolist() == pytest.approx([2.0, 1.0, math.exp(-2)])
    assert terms.capped.tolist() == [True, False, False]


def test_an_absurd_ratio_stays_finite() -> None:
    terms = policy_loss(
        torch.tensor([-1e-3]), torch.tensor([-500.0]), torch.tensor([-1e-3]), torch.tensor([-1.0]),
        token_count=1, clip_low=LOW, clip_high=HIGH, importance_cap=CAP,
    )  # fmt: skip
    assert math.isfinite(terms.loss.item())
    assert math.exp(MAX_LOG_RATIO) < torch.finfo(torch.float32).max


def test_micro_batches_add_up_to_the_window() -> None:
    torch.manual_seed(0)
    now, behaviour, advantages = -torch.rand(10), -torch.rand(10), torch.randn(10)

    def loss(part: slice) -> float:
        return policy_loss(
            now[part], now[part], behaviour[part], advantages[part],
            token_count=10, clip_low=LOW, clip_high=HIGH, importance_cap=CAP,
        ).loss.item()  # fmt: skip

    assert loss(slice(0, 3)) + loss(slice(3, 10)) == pytest.approx(loss(slice(0, 10)), rel=1e-5)


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    """Expectations over all tokens, weighted as the behaviour policy samples them, are the KL itself."""
    behaviour, current = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (behaviour * (behaviour.log() - current.log())).sum().item()
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    k1, k3 = behaviour_kl(current.log()[drawn], behaviour.log()[drawn])
    assert k1 == pytest.approx(exact, abs=1e-6)
    assert k3 == pytest.approx(exact, abs=1e-6)

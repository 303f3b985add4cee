"""The `clip` correction: PPO's surrogate against the recorded logprobs, by hand: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.aggregation import window_totals
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.trainer.losses import LossTerms, ScoredTokens, micro_batch_loss

token = st.tuples(st.floats(-4, -1e-3), st.floats(-4, -1e-3), st.floats(-3, 3))
bound = st.floats(0.05, 0.5)


def clip_loss(
    current: torch.Tensor, behaviour: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> LossTerms:
    sequences = Sequences.from_lengths(torch.tensor([len(current)]))
    tokens = ScoredTokens(current, torch.zeros_like(current), behaviour, advantages, sequences)
    return micro_batch_loss(TrainerSettings(clip_low=low, clip_high=high), tokens, window_totals([len(current)]))


def by_hand(tokens: list[tuple[float, float, float]], low: float, high: float) -> tuple[float, list[float]]:
    loss, gradients = 0.0, list[float]()
    for current, behaviour, advantage in tokens:
        ratio = math.exp(current - behaviour)
        if advantage >= 0:
            held = ratio > 1 + high
            bounded = 1 + high if held else ratio
        else:
            held = ratio < 1 - low
            bounded = 1 - low if held else ratio
        loss -= bounded * advantage / len(tokens)
        gradients.append(0.0 if held else -ratio * advantage / len(tokens))
    return loss, gradients


@settings(deadline=None, max_examples=150)
@given(st.lists(token, min_size=1, max_size=12), bound, bound)
def test_value_and_gradient_are_those_of_ppo(tokens: list[tuple[float, float, float]], low: float, high: float) -> None:
    current, behaviour, advantages = torch.tensor(tokens, dtype=torch.float64).T
    # At the very edge of the clip both gradients are right: stay away from it.
    ratios = (current - behaviour).exp()
    if any(((ratios - edge).abs() < 1e-6).any() for edge in (1 - low, 1 + high)):
        return
    current = current.clone().requires_grad_()
    terms = clip_loss(current, behaviour, advantages, low, high)
    terms.loss.backward()
    loss, gradients = by_hand(tokens, low, high)
    assert current.grad is not None
    assert terms.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert current.grad.tolist() == pytest.approx(gradients, rel=1e-9, abs=1e-12)
    assert terms.ratios.tolist() == pytest.approx(ratios.tolist(), rel=1e-9)
    assert not terms.held.any(), "bounds on weights are the other corrections'"

"""Policy losses: by hand where libraries disagree, and what holds for all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fulgurite.streams.objectives.advantages import ESTIMATORS
from fulgurite.streams.objectives.aggregation import token_weights, window_totals
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.policy_losses import (
    SURROGATES,
    PolicyTokens,
    cispo,
    clipped,
    policy_loss,
    sequence_clipped,
)
from fulgurite.streams.objectives.recipes import POLICY_LOSSES, Clip, find
from tests.streams.objectives.batch import Batch, batches

ONE = Sequences.from_lengths(torch.tensor([1]))
names = st.sampled_from(sorted(POLICY_LOSSES))


def one_token(ratio: float, advantage: float, clip: Clip) -> tuple[float, float, bool, bool]:
    """Loss, d loss / d log p, clipped, dual clipped of a token whose ratio this is."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    parts = clipped(PolicyTokens(logprobs, old, torch.tensor([advantage], dtype=torch.float64), ONE), clip)
    (gradient,) = torch.autograd.grad(parts.losses.sum(), logprobs)
    return parts.losses.item(), gradient.item(), bool(parts.clipped.item()), bool(parts.dual_clipped.item())


def on_policy(batch: Batch) -> PolicyTokens:
    logprobs = batch.logprobs.clone().requires_grad_()
    return PolicyTokens(logprobs, batch.logprobs, batch.advantages, batch.sequences)


def weights_of(batch: Batch) -> Tensor:
    totals = window_totals(batch.sequences.lengths.tolist())
    return token_weights("sequence_mean", batch.sequences, totals, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "held"),
    [
        (1.1, 2.0, -2.2, -2.2, False),
        (1.3, 2.0, -2.56, 0.0, True),
        (0.5, 2.0, -1.0, -1.0, False),  # the pessimistic minimum: no clip below for a good token
        (0.5, -2.0, 1.6, 0.0, True),
        (5.0, -2.0, 10.0, 10.0, False),  # and none above for a bad one
    ],
)
def test_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, held: bool) -> None:
    got = one_token(ratio, advantage, Clip(0.2, 0.28))
    assert got[:2] == pytest.approx((loss, gradient))
    assert got[2] is held
    assert got[3] is False


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    """verl always has it at 3, TRL only if asked (delta): without it the loss of ratio 5 is 10."""
    assert one_token(5.0, -2.0, Clip(0.2, 0.2))[0] == pytest.approx(10.0)
    loss, gradient, _, dual = one_token(5.0, -2.0, Clip(0.2, 0.2, dual=3.0))
    assert (loss, gradient, dual) == (pytest.approx(6.0), 0.0, True)
    # It is for bad tokens, and for ratios past it, only.
    assert one_token(2.9, -2.0, Clip(0.2, 0.2, dual=3.0))[1] == pytest.approx(5.8)
    assert one_token(5.0, 2.0, Clip(0.2, 0.2, dual=3.0))[:2] == pytest.approx((-2.4, 0.0))


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(-0.1, 0.2, None), (1.5, 0.2, None), (0.2, -0.1, None), (0.2, 0.2, 1.1)]
)
def test_bounds_that_make_no_sense_are_refused(low: float, high: float, dual: float | None) -> None:
    with pytest.raises(ValueError, match="clip"):
        Clip(low, high, dual)


def test_cispo_learns_from_tokens_past_its_bounds() -> None:
    """verl: 1 + high is the bound; TRL's epsilon_high = 5.0 is our high = 4.0. low = 1 is no lower bound."""
    logprobs = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - torch.tensor([0.1, 1.0, 8.0], dtype=torch.float64).log()
    three = Sequences.from_lengths(torch.tensor([3]))
    parts = cispo(PolicyTokens(logprobs, old, torch.full((3,), 2.0, dtype=torch.float64), three), Clip(1.0, 4.0))
    (gradient,) = torch.autograd.grad(parts.losses.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-0.2, -2.0, -10.0])
    assert parts.losses.tolist() == pytest.approx([0.2, 2.0, 10.0])
    assert parts.clipped.tolist() == [False, False, True]


def test_gspo_clips_a_sequence_as_one() -> None:
    """Token ratios of 2 and 1/2 are a sequence ratio of 1: token-wise both would be clipped."""
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    two = Sequences.from_lengths(torch.tensor([2, 1]))
    tokens = PolicyTokens(logprobs, logprobs.detach() - ratios.log(), advantages, two)
    parts = sequence_clipped(tokens, Clip(0.2, 0.2))
    (gradient,) = torch.autograd.grad(parts.losses.sum(), logprobs)
    assert parts.ratios.tolist() == pytest.approx([1.0, 1.0, 1.5])
    assert parts.clipped.tolist() == [False, False, True]
    assert gradient.tolist() == pytest.approx([-1.0, -1.0, 0.0])


@settings(deadline=None, max_examples=50)
@given(batches)
def test_gspos_token_form_has_the_gradient_of_the_sequences_ratio(batch: Batch) -> None:
    """Where a sequence's tokens share advantage and weight: TRL and AReaL differentiate the ratio itself."""
    logprobs = batch.logprobs.clone().requires_grad_()
    advantages = batch.sequences.means(batch.advantages)
    log_s = batch.sequences.means(logprobs - batch.old)
    s = log_s.exp()
    plain = -torch.minimum(s * advantages, s.clamp(0.8, 1.2) * advantages).mean()
    (expected,) = torch.autograd.grad(plain, logprobs)
    parts = sequence_clipped(PolicyTokens(logprobs, batch.old, batch.advantages, batch.sequences), Clip(0.2, 0.2))
    value = (weights_of(batch) * parts.losses).sum()
    (gradient,) = torch.autograd.grad(value, logprobs)
    assert value.item() == pytest.approx(plain.item(), rel=1e-9, abs=1e-12)
    assert gradient.tolist() == pytest.approx(expected.tolist(), rel=1e-8, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(batches, names)
def test_at_ratio_one_every_loss_has_reinforces_gradient(batch: Batch, name: str) -> None:
    tokens, weights = on_policy(batch), weights_of(batch)
    loss, parts = policy_loss(name, tokens, weights)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    assert gradient.tolist() == pytest.approx((-batch.advantages * weights).tolist(), rel=1e-9, abs=1e-12)
    assert not parts.clipped.any()
    assert not parts.dual_clipped.any()
    assert parts.ratios.tolist() == pytest.approx([1.0] * len(parts.ratios))


@settings(deadline=None, max_examples=20)
@given(batches, names)
def test_gradients_are_those_of_finite_differences(batch: Batch, name: str) -> None:
    """Where nothing is stopped on purpose: CISPO's and GSPO's stopped parts are not what the value says."""
    surrogate = SURROGATES[POLICY_LOSSES[name].surrogate]
    if POLICY_LOSSES[name].surrogate not in ("clipped", "reinforce"):
        return
    clip = POLICY_LOSSES[name].clip
    ratios = (batch.logprobs - batch.old).exp()
    edges = (1 - clip.low, 1 + clip.high, *([clip.dual] if clip.dual else []))
    if any(((ratios - edge).abs() < 1e-4).any() for edge in edges):
        return  # a kink has no derivative

    def value(logprobs: Tensor) -> Tensor:
        return surrogate(PolicyTokens(logprobs, batch.old, batch.advantages, batch.sequences), clip).losses

    assert torch.autograd.gradcheck(value, (batch.logprobs.clone().requires_grad_(),))


@settings(deadline=None, max_examples=10)
@given(batches)
def test_an_advantage_of_zero_teaches_nothing(batch: Batch) -> None:
    for name in POLICY_LOSSES:
        logprobs = batch.logprobs.clone().requires_grad_()
        tokens = PolicyTokens(logprobs, batch.old, torch.zeros_like(batch.advantages), batch.sequences)
        loss, _ = policy_loss(name, tokens, weights_of(batch))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient.abs().max() == 0.0, name


def test_absurd_ratios_stay_finite() -> None:
    for name in POLICY_LOSSES:
        logprobs = torch.tensor([-1e-3, -500.0], requires_grad=True)
        old, advantages = torch.tensor([-500.0, -1e-3]), torch.tensor([-1.0, 1.0])
        tokens = PolicyTokens(logprobs, old, advantages, Sequences.from_lengths(torch.tensor([1, 1])))
        loss, _ = policy_loss(name, tokens, torch.full((2,), 0.5))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert torch.isfinite(loss), name
        assert torch.isfinite(gradient).all(), name


def test_recipes_are_complete_and_named() -> None:
    assert {loss.advantage for loss in POLICY_LOSSES.values()} == set(ESTIMATORS)
    assert all(loss.source for loss in POLICY_LOSSES.values())
    with pytest.raises(ValueError, match="there are grpo, dr_grpo"):
        find("gpro")
    changed = find("grpo").with_clip(None, 0.3, None)
    assert changed.clip == Clip(0.2, 0.3)
    assert find("grpo").clip == Clip(0.2, 0.2)

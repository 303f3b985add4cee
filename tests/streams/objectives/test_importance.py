"""Importance weights: levels, bounds and gates by hand, and the identity they are for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from fulgurite.streams.objectives.importance import effective_sample_fraction, importance_weights
from fulgurite.streams.objectives.packing import Sequences
from tests.streams.objectives.batch import Batch, batches

TWO = Sequences.from_lengths(torch.tensor([2, 1]))
BEHAVIOUR = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
RATIOS = torch.tensor([4.0, 0.5, 3.0], dtype=torch.float64)
PROXIMAL = BEHAVIOUR + RATIOS.log()


def test_tokens_are_truncated_from_above_only_unless_said() -> None:
    found = importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="truncate", high=2.0)
    assert found.weights.tolist() == pytest.approx([2.0, 0.5, 2.0])
    assert found.held.tolist() == [True, False, True]
    floored = importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="truncate", high=2.0, low=0.8)
    assert floored.weights.tolist() == pytest.approx([2.0, 0.8, 2.0])


def test_masked_tokens_weigh_nothing() -> None:
    found = importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="mask", low=0.4, high=3.5)
    assert found.weights.tolist() == pytest.approx([0.0, 0.5, 3.0])
    assert found.held.tolist() == [True, False, False]
    # A ratio at a bound is kept.
    exact = importance_weights(BEHAVIOUR, BEHAVIOUR, TWO, mode="mask", low=1.0, high=2.0)
    assert exact.weights.tolist() == [1.0, 1.0, 1.0]


def test_a_sequences_weight_is_a_product_or_a_geometric_mean() -> None:
    """verl, SkyRL and TRL multiply, AReaL takes the mean: 2 against 1.41 for two tokens, far apart for many."""
    product = importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="truncate", high=9.0, level="sequence_product")
    assert product.weights.tolist() == pytest.approx([2.0, 2.0, 3.0])
    mean = importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="truncate", high=9.0, level="sequence_mean")
    assert mean.weights.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2), 3.0])


def test_a_gate_refuses_sequences_and_keeps_the_weights_of_tokens() -> None:
    found = importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="mask", high=2.0, gate="sequence_mean")
    assert found.weights.tolist() == pytest.approx([4.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="gate"):
        importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="truncate", high=2.0, gate="sequence_mean")


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (-1.0, 2.0), (0.0, 0.0)])
def test_bounds_that_make_no_sense_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="bounds"):
        importance_weights(PROXIMAL, BEHAVIOUR, TWO, mode="mask", low=low, high=high)


@settings(deadline=None, max_examples=50)
@given(batches)
def test_the_same_policy_weighs_one_at_every_level(batch: Batch) -> None:
    for level in ("token", "sequence_mean", "sequence_product"):
        found = importance_weights(batch.old, batch.old, batch.sequences, mode="mask", low=0.5, high=2.0, level=level)
        assert found.weights.tolist() == [1.0] * len(batch.old)
        assert not found.held.any()


def test_they_carry_no_gradient() -> None:
    proximal = PROXIMAL.clone().requires_grad_()
    assert not importance_weights(proximal, BEHAVIOUR, TWO, mode="truncate", high=2.0).weights.requires_grad


def test_weighted_samples_of_one_policy_are_expectations_of_another() -> None:
    """Exactly, over all tokens of a vocabulary: E_q[p/q f] = E_p[f]."""
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    function = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    each = Sequences.from_lengths(torch.tensor([1, 1, 1]))
    weights = importance_weights(p.log(), q.log(), each, mode="truncate", high=100.0).weights
    assert (q * weights * function).sum().item() == pytest.approx((p * function).sum().item())


def test_effective_sample_fraction() -> None:
    assert effective_sample_fraction(torch.ones(7)) == pytest.approx(1.0)
    assert effective_sample_fraction(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective_sample_fraction(torch.zeros(3)) == 0.0

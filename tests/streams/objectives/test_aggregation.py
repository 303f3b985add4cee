"""Weights per token: what each aggregation means, and that micro-batches add up to their window."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.streams.objectives.aggregation import Aggregation, token_weights, window_totals
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.objectives.policy_losses import PolicyTokens, policy_loss
from fulgurite.streams.objectives.recipes import POLICY_LOSSES
from tests.streams.objectives.batch import Batch, batches

LOSSES = torch.tensor([1.0, 2.0, 3.0, 10.0])
TWO = Sequences.from_lengths(torch.tensor([3, 1]))
TOTALS = window_totals([3, 1])


def aggregated(aggregation: Aggregation, constant: float | None = None) -> float:
    return float((token_weights(aggregation, TWO, TOTALS, constant=constant) * LOSSES).sum())


def test_by_hand() -> None:
    assert aggregated("token_mean") == pytest.approx(16 / 4)
    assert aggregated("sequence_mean") == pytest.approx((2 + 10) / 2)
    assert aggregated("sequence_sum", 8.0) == pytest.approx((6 + 10) / (2 * 8))


def test_the_constant_of_a_sum_must_be_said() -> None:
    """Libraries put the longest length of the batch, which makes a step's size depend on the longest answer."""
    with pytest.raises(ValueError, match="constant"):
        aggregated("sequence_sum")
    with pytest.raises(ValueError, match="constant"):
        aggregated("sequence_sum", 0.0)


def test_sequences_without_sampled_tokens_do_not_count() -> None:
    sequences = Sequences.from_lengths(torch.tensor([2, 0, 1]))
    totals = window_totals([2, 0, 1])
    assert (totals.tokens, totals.sequences) == (3, 2)
    assert token_weights("sequence_mean", sequences, totals).tolist() == pytest.approx([0.25, 0.25, 0.5])


def share_of(batch: Batch, name: str, totals_of: Batch) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a micro-batch under the totals of its window."""
    loss = POLICY_LOSSES[name]
    logprobs = batch.logprobs.clone().requires_grad_()
    weights = token_weights(
        loss.aggregation,
        batch.sequences,
        window_totals(totals_of.sequences.lengths.tolist()),
        constant=9.0,
        dtype=torch.float64,
    )
    value, _ = policy_loss(loss, PolicyTokens(logprobs, batch.old, batch.advantages, batch.sequences), weights)
    (gradient,) = torch.autograd.grad(value, logprobs)
    return value.item(), gradient


@settings(deadline=None, max_examples=60)
@given(batches, st.data(), st.sampled_from(sorted(POLICY_LOSSES)))
def test_any_split_into_micro_batches_adds_up(batch: Batch, data: st.DataObject, name: str) -> None:
    count = len(batch.sequences.lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, count - 1)), max_size=3)) & set(range(1, count)))
    edges = [0, *cuts, count]
    parts = [share_of(batch.part(first, last), name, batch) for first, last in pairwise(edges)]
    whole_value, whole_gradient = share_of(batch, name, batch)
    assert sum(value for value, _ in parts) == pytest.approx(whole_value, rel=1e-9, abs=1e-12)
    assert torch.cat([gradient for _, gradient in parts]).tolist() == pytest.approx(
        whole_gradient.tolist(), rel=1e-9, abs=1e-12
    )


def test_a_window_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without sampled tokens"):
        window_totals([0, 0])


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_an_empty_micro_batch_adds_nothing(name: str) -> None:
    """A rank with fewer sequences than others takes part with one that has no sampled token."""
    nothing = Sequences.from_index(torch.zeros(0, dtype=torch.int64), 1)
    logprobs = torch.zeros(0, requires_grad=True)
    tokens = PolicyTokens(logprobs, torch.zeros(0), torch.zeros(0), nothing)
    weights = token_weights(POLICY_LOSSES[name].aggregation, nothing, TOTALS, constant=8.0)
    loss, _ = policy_loss(name, tokens, weights)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None


def test_an_index_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="lie together"):
        Sequences.from_index(torch.tensor([0, 1, 0]), 2)
    assert Sequences.from_index(torch.tensor([0, 0, 2]), 3).lengths.tolist() == [2, 0, 1]

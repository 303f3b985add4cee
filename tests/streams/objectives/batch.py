"""Packed batches for the tests of objectives: lengths and log-probabilities, drawn or random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fulgurite.streams.objectives.packing import Sequences


@dataclass(frozen=True)
class Batch:
    """All [N] in float64, and the sequences they are of; advantages are one number a sequence."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    sequences: Sequences

    def part(self, first: int, last: int) -> Batch:
        """Sequences first..last-1 as a micro-batch of their own."""
        lengths = self.sequences.lengths
        start, end = int(lengths[:first].sum()), int(lengths[:last].sum())
        cut = slice(start, end)
        return Batch(
            self.logprobs[cut], self.old[cut], self.advantages[cut], Sequences.from_lengths(lengths[first:last])
        )


def random_batch(lengths: Sequence[int], seed: int = 0, spread: float = 0.5) -> Batch:
    """`spread` is how far the two policies are apart: the deviation of the log-ratio."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    sequences = Sequences.from_lengths(torch.tensor(lengths))
    old = -3.0 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.05
    logprobs = old + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages = sequences.spread(torch.randn(len(lengths), generator=generator, dtype=torch.float64))
    return Batch(logprobs, old, advantages, sequences)


batches = st.builds(
    random_batch,
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(0, 2**16),
    st.sampled_from([0.01, 0.3, 1.0]),
)

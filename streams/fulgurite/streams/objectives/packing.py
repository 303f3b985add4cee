"""Which of the packed tokens belong together: sums and means over sequences without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """The S sequences of a micro-batch. A sequence is whole in its micro-batch, and its tokens lie together."""

    index: Tensor
    """[N] int64, not falling: the sequence of each token, from 0."""
    lengths: Tensor
    """[S] int64: how many tokens each has; 0 is allowed."""

    @staticmethod
    def from_lengths(lengths: Tensor) -> Sequences:
        """lengths [S] -> the sequences, in this order."""
        return Sequences(torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths), lengths)

    @staticmethod
    def from_index(index: Tensor, count: int) -> Sequences:
        """index [N], not falling, values in [0, count) -> the sequences."""
        if index.numel() and bool((index.diff() < 0).any()):
            raise ValueError("the tokens of a sequence must lie together, in the order of the sequences")
        return Sequences(index, torch.bincount(index, minlength=count))

    def sums(self, values: Tensor) -> Tensor:
        """values [N] -> [S]."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.index, values)

    def means(self, values: Tensor) -> Tensor:
        """values [N] -> [S]; the mean of no tokens is 0."""
        return self.sums(values) / self.lengths.clamp(min=1).to(values.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """values [S] -> [N]: each token gets its sequence's."""
        return values[self.index]

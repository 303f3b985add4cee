"""One window of random rollouts, packed as ours and padded as the libraries take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fulgurite.streams.objectives.packing import Sequences

GROUP = 4
LENGTHS = (7, 1, 4, 12, 3, 9, 2, 5, 8, 1, 6, 11)


@dataclass(frozen=True)
class Case:
    """[N] tensors in float64 over the sampled tokens of 12 sequences, in groups of 4."""

    logprobs: Tensor
    """A leaf: gradients are with respect to it."""
    proximal: Tensor
    behaviour: Tensor
    reference: Tensor
    advantages: Tensor
    """[S]"""
    rewards: Tensor
    """[S]"""
    sequences: Sequences
    columns: Tensor
    """[N] where in its padded row a token stands: with gaps, as answers of tools leave them."""

    @property
    def token_advantages(self) -> Tensor:
        return self.sequences.spread(self.advantages)

    @property
    def mask(self) -> Tensor:
        """[S, T] 1 where a token was sampled."""
        return self.padded(torch.ones(len(self.columns)))

    def padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[N] -> [S, T], differentiable."""
        width = int(self.columns.max()) + 3
        table = torch.full((len(self.sequences.lengths), width), fill, dtype=values.dtype)
        return table.index_put((self.sequences.index, self.columns), values)

    @property
    def groups(self) -> list[list[float]]:
        """The rewards, [groups][rollouts]."""
        return self.rewards.view(-1, GROUP).tolist()

    def without_gaps(self) -> Case:
        starts = self.sequences.lengths.cumsum(0) - self.sequences.lengths
        return replace(self, columns=torch.arange(len(self.columns)) - self.sequences.spread(starts))

    def packed(self, table: Tensor) -> Tensor:
        """[S, T] -> [N]."""
        return table[self.sequences.index, self.columns]


def random_case(seed: int, spread: float) -> Case:
    """`spread` is the deviation of the log-ratio of current and proximal policy, and of proximal and behaviour."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    count, sequences = int(lengths.sum()), Sequences.from_lengths(lengths)

    def noise(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    behaviour = -2.5 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.05
    # Sequences drift as wholes too: otherwise no sequence's mean would leave its bounds.
    drift = sequences.spread(spread * noise(len(lengths)))
    proximal = behaviour + spread * noise(count) + 0.5 * drift
    logprobs = (proximal + spread * noise(count) + drift).requires_grad_()
    columns: list[Tensor] = []
    for length in LENGTHS:
        steps = torch.randint(1, 3, (length,), generator=generator)
        columns.append(steps.cumsum(0) - 1)
    return Case(
        logprobs=logprobs,
        proximal=proximal,
        behaviour=behaviour,
        reference=logprobs.detach() + spread * noise(count),
        advantages=noise(len(lengths)),
        rewards=noise(len(lengths)),
        sequences=sequences,
        columns=torch.cat(columns),
    )


def cases() -> list[Case]:
    """Near the policy, as after one step, and far: clips, caps and masks act in the last two."""
    return [random_case(seed, spread) for seed, spread in enumerate((0.0, 0.05, 0.3, 0.3, 0.8, 0.8))]

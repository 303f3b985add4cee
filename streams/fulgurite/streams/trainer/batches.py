"""Samples -> padded tensors, a bounded number of tokens at a time.

Padding is told apart by length, never by token id: a sampled token may be the padding token (measured: masking by id
moved a logprob by 0.74). Sequences are padded on the right and the model is causal, so no real token ever sees padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.streams.trainer.samples import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """[B, T] tokens and, flat over the N sampled tokens, what the loss needs to know about each."""

    token_ids: Tensor
    """[B, T] int64, padded with 0 on the right."""
    rows: Tensor
    """[N] which sequence; in the order of sequences, then positions."""
    positions: Tensor
    """[N] where in it, from 1: logits of the position before predict it."""
    targets: Tensor
    """[N] the tokens themselves."""
    behaviour_logprobs: Tensor
    versions: Tensor
    advantages: Tensor
    rollout_ids: list[str]
    """[B] for messages."""

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            token_ids=self.token_ids.to(device),
            rows=self.rows.to(device),
            positions=self.positions.to(device),
            targets=self.targets.to(device),
            behaviour_logprobs=self.behaviour_logprobs.to(device),
            versions=self.versions.to(device),
            advantages=self.advantages.to(device),
            rollout_ids=self.rollout_ids,
        )


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> Iterator[MicroBatch]:
    """Longest first, as many a batch as `max_tokens` padded tokens allow, at least one. The order is deterministic."""
    ordered = sorted(samples, key=lambda sample: -len(sample.token_ids))
    start = 0
    while start < len(ordered):
        length = len(ordered[start].token_ids)
        count = max(1, max_tokens // length)
        yield micro_batch(ordered[start : start + count])
        start += count


def micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    longest = max(len(sample.token_ids) for sample in samples)
    token_ids = torch.zeros((len(samples), longest), dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    behaviour: list[float] = []
    versions: list[int] = []
    advantages: list[float] = []
    for row, sample in enumerate(samples):
        token_ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids, dtype=torch.int64)
        sampled = [position for position, mask in enumerate(sample.loss_mask) if mask]
        assert not sampled or sampled[0] > 0, "position 0 cannot be predicted: member_of refuses it"
        rows += [row] * len(sampled)
        positions += sampled
        behaviour += [sample.behaviour_logprobs[position] for position in sampled]
        versions += [sample.versions[position] for position in sampled]
        advantages += [sample.advantage] * len(sampled)
    row_index, position_index = torch.tensor(rows), torch.tensor(positions)
    return MicroBatch(
        token_ids=token_ids,
        rows=row_index,
        positions=position_index,
        targets=token_ids[row_index, position_index],
        behaviour_logprobs=torch.tensor(behaviour, dtype=torch.float32),
        versions=torch.tensor(versions, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        rollout_ids=[sample.rollout_id for sample in samples],
    )

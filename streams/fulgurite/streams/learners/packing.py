"""Samples -> micro-batches of packed sequences: a bounded number of tokens each, equally many on every rank.

Sequences lie end to end, so there is no padding and nothing to mask by token id: a sampled token may be the padding
token (measured: masking by id moved a logprob by 0.74). Promises: every sample is in exactly one micro-batch of one
rank; every rank has the same number of micro-batches (with ZeRO-3 a rank that has fewer leaves the others waiting for
ever); the plan follows from lengths alone, so the same samples give the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.streams.learners.attention import Layout, layout_of
from fulgurite.streams.trainer.sample import Sample


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N tokens of B sequences, and for the M sampled ones what a loss needs to know about each."""

    token_ids: Tensor
    """[N] int64."""
    position_ids: Tensor
    """[N] int64, from 0 in each sequence."""
    layout: Layout
    predicting: Tensor
    """[M] int64: the place in [N] whose hidden state predicts the sampled token, one before it."""
    targets: Tensor
    """[M] the sampled tokens."""
    sequences: Tensor
    """[M] which sequence, 0..B - 1, ascending."""
    behaviour_logprobs: Tensor
    versions: Tensor
    advantages: Tensor
    rollout_ids: list[str]
    """[B] for messages."""
    proximal_logprobs: Tensor | None = None
    """[M] under the policy at the window's beginning."""

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            layout=self.layout.to(device),
            predicting=self.predicting.to(device),
            targets=self.targets.to(device),
            sequences=self.sequences.to(device),
            behaviour_logprobs=self.behaviour_logprobs.to(device),
            versions=self.versions.to(device),
            advantages=self.advantages.to(device),
            rollout_ids=self.rollout_ids,
            proximal_logprobs=None if self.proximal_logprobs is None else self.proximal_logprobs.to(device),
        )


def plan(lengths: Sequence[int], *, max_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Sample numbers by rank and micro-batch: [ranks][K][...], K the same on every rank.

    At most `max_tokens` a micro-batch, unless one sample alone is longer; as few micro-batches as longest-first filling
    of the emptiest finds. What runs at the same time on all ranks is about equally large. A micro-batch may be empty
    where there are fewer samples than ranks: that rank takes part with nothing.
    """
    if not lengths:
        return [[] for _ in range(ranks)]
    count = max(1, -(-sum(lengths) // (max_tokens * ranks)))
    while True:
        bins = _fill(lengths, count * ranks)
        if all(load <= max_tokens or len(members) == 1 for load, members in bins):
            break
        count += 1
    bins.sort(key=lambda each: (-each[0], each[1]))
    return [[sorted(bins[step * ranks + rank][1]) for step in range(count)] for rank in range(ranks)]


def _fill(lengths: Sequence[int], bins: int) -> list[tuple[int, list[int]]]:
    """(tokens, sample numbers) of each bin, each sample into the emptiest, the longest first."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(bins)]
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        load, number, members = heap[0]
        members.append(sample)
        heapq.heapreplace(heap, (load + lengths[sample], number, members))
    return [(load, members) for load, _, members in heap]


def pack(samples: Sequence[Sample], proximal: Sequence[Tensor] | None = None) -> PackedBatch:
    """One micro-batch; at least one sample. `proximal`: log p of each sample's sampled tokens."""
    lengths = [len(sample.token_ids) for sample in samples]
    token_ids: list[int] = []
    predicting: list[int] = []
    sequences: list[int] = []
    behaviour: list[float] = []
    versions: list[int] = []
    advantages: list[float] = []
    for number, sample in enumerate(samples):
        sampled = [position for position, mask in enumerate(sample.loss_mask) if mask]
        assert not sampled or sampled[0] > 0, "position 0 cannot be predicted: member_of refuses it"
        predicting += [len(token_ids) + position - 1 for position in sampled]
        sequences += [number] * len(sampled)
        behaviour += [sample.behaviour_logprobs[position] for position in sampled]
        versions += [sample.versions[position] for position in sampled]
        advantages += sample.sampled_advantages()
        token_ids += sample.token_ids
    tokens, places = torch.tensor(token_ids), torch.tensor(predicting, dtype=torch.int64)
    return PackedBatch(
        token_ids=tokens,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        layout=layout_of(lengths),
        predicting=places,
        targets=tokens[places + 1],
        sequences=torch.tensor(sequences, dtype=torch.int64),
        behaviour_logprobs=torch.tensor(behaviour, dtype=torch.float32),
        versions=torch.tensor(versions, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        rollout_ids=[sample.rollout_id for sample in samples],
        proximal_logprobs=torch.cat(list(proximal)) if proximal else None,
    )

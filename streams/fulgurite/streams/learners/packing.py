"""Samples -> micro-batches of packed sequences: a bounded number of tokens each, equally many on every rank.

Sequences lie end to end, so there is no padding and nothing to mask by token id: a sampled token may be the padding
token (measured: masking by id moved a logprob by 0.74). A prompt that several begin with, as a group's rollouts do, is
there once (attention.py). Promises: every sample is in exactly one micro-batch of one rank; every rank has the same
number of micro-batches (with ZeRO-3 a rank that has fewer leaves the others waiting for ever); the plan follows from
lengths and common prompts alone, so the same samples give the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fulgurite.streams.learners.attention import Layout, layout_of
from fulgurite.streams.trainer.sample import Sample

LEAST_SHARED_TOKENS: Final = 16
"""A common prompt shorter than this saves less than finding it costs."""
SHARED_TOKEN_COST: Final = 4
"""Of so many tokens that a further sequence reads of a common prompt, each costs one token's memory: its attention."""


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


@dataclass(frozen=True, slots=True)
class _Unit:
    """Samples that are best in one micro-batch, and their tokens."""

    members: list[int]
    tokens: int


def shared_prompts(samples: Sequence[Sample]) -> list[list[int]]:
    """Numbers of the samples that begin with the same prompt, all tokens before the first sampled one; those of no
    common prompt alone. In the order of their first members."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, sample in enumerate(samples):
        length = prompt_tokens(sample)
        # A short prompt is everybody's own; no prompt has a negative token.
        key = tuple(sample.token_ids[:length]) if length >= LEAST_SHARED_TOKENS else (-1 - number,)
        found.setdefault(key, []).append(number)
    return list(found.values())


def prompt_tokens(sample: Sample) -> int:
    """How many come before the first sampled one; all, where none was sampled."""
    return sample.loss_mask.index(1) if 1 in sample.loss_mask else len(sample.loss_mask)


def tokens_once(samples: Sequence[Sample], together: Sequence[Sequence[int]]) -> int:
    """Of all samples, common prompts counted once."""
    again = sum(prompt_tokens(samples[members[0]]) * (len(members) - 1) for members in together)
    return sum(len(sample.token_ids) for sample in samples) - again


def plan(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    ranks: int = 1,
    together: Sequence[Sequence[int]] = (),
    prompts: Sequence[int] = (),
) -> list[list[list[int]]]:
    """Sample numbers by rank and micro-batch: [ranks][K][...], K the same on every rank.

    At most `max_tokens` a micro-batch, unless one sample alone is longer; as few micro-batches as longest-first filling
    of the emptiest finds. What runs at the same time on all ranks is about equally large. A micro-batch may be empty
    where there are fewer samples than ranks: that rank takes part with nothing.

    `together`, as `shared_prompts` finds them, are kept together as far as that goes; `prompts` is the length of each
    sample's.
    """
    if not lengths:
        return [[] for _ in range(ranks)]
    units = _units(lengths, prompts, together, max_tokens, ranks)
    total = sum(unit.tokens for unit in units)
    count = max(1, -(-total // (max_tokens * ranks)))
    while True:
        bins = _fill(units, count * ranks)
        if all(load <= max_tokens or len(members) == 1 for load, members in bins):
            break
        count += 1
    bins.sort(key=lambda each: (-each[0], each[1]))
    return [[sorted(bins[step * ranks + rank][1]) for step in range(count)] for rank in range(ranks)]


def _units(
    lengths: Sequence[int], prompts: Sequence[int], together: Sequence[Sequence[int]], max_tokens: int, ranks: int
) -> list[_Unit]:
    """Groups, cut where they would not fit a micro-batch, or leave ranks without work."""
    if not together:
        return [_Unit([number], length) for number, length in enumerate(lengths)]
    more = [length - prompt + -(-prompt // SHARED_TOKEN_COST) for length, prompt in zip(lengths, prompts, strict=True)]
    whole = sum(lengths[group[0]] + sum(more[number] for number in group[1:]) for group in together)
    bound = max_tokens if ranks == 1 else min(max_tokens, whole // (2 * ranks))
    units: list[_Unit] = []
    for group in together:
        open_one: _Unit | None = None
        for number in group:
            if open_one and open_one.tokens + more[number] <= bound:
                open_one = _Unit([*open_one.members, number], open_one.tokens + more[number])
                units[-1] = open_one
            else:
                open_one = _Unit([number], lengths[number])
                units.append(open_one)
    return units


def _fill(units: Sequence[_Unit], bins: int) -> list[tuple[int, list[int]]]:
    """(tokens, sample numbers) of each bin, each unit into the emptiest, the largest first."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(bins)]
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        load, number, members = heap[0]
        members += unit.members
        heapq.heapreplace(heap, (load + unit.tokens, number, members))
    return [(load, members) for load, _, members in heap]


def pack(
    samples: Sequence[Sample], proximal: Sequence[Tensor] | None = None, *, share_prompts: bool = False
) -> PackedBatch:
    """One micro-batch; at least one sample. `proximal`: log p of each sample's sampled tokens."""
    places, token_ids, position_ids = _places(samples, share_prompts=share_prompts)
    predicting: list[Tensor] = []
    targets: list[Tensor] = []
    sequences: list[int] = []
    behaviour: list[float] = []
    versions: list[int] = []
    advantages: list[float] = []
    for number, sample in enumerate(samples):
        sampled = torch.tensor(sample.loss_mask).nonzero().squeeze(1)
        assert not len(sampled) or sampled[0] > 0, "position 0 cannot be predicted: member_of refuses it"
        predicting.append(places[number][sampled - 1])
        targets.append(token_ids[places[number][sampled]])
        at = sampled.tolist()
        sequences += [number] * len(at)
        behaviour += [sample.behaviour_logprobs[position] for position in at]
        versions += [sample.versions[position] for position in at]
        advantages += sample.sampled_advantages()
    every = torch.cat(places)
    return PackedBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        layout=layout_of([len(sample.token_ids) for sample in samples], every if len(every) > len(token_ids) else None),
        predicting=torch.cat(predicting),
        targets=torch.cat(targets),
        sequences=torch.tensor(sequences, dtype=torch.int64),
        behaviour_logprobs=torch.tensor(behaviour, dtype=torch.float32),
        versions=torch.tensor(versions, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        rollout_ids=[sample.rollout_id for sample in samples],
        proximal_logprobs=torch.cat(list(proximal)) if proximal else None,
    )


def _places(samples: Sequence[Sample], *, share_prompts: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Where each sample's tokens lie among the packed ones; those tokens, and their positions, [N] each."""
    first_of = {
        number: members[0] for members in (shared_prompts(samples) if share_prompts else ()) for number in members
    }
    places: list[Tensor] = []
    token_ids: list[int] = []
    positions: list[Tensor] = []
    for number, sample in enumerate(samples):
        first = first_of.get(number, number)
        shared = prompt_tokens(sample) if first != number else 0
        begin = torch.arange(len(token_ids), len(token_ids) + len(sample.token_ids) - shared)
        places.append(torch.cat([places[first][:shared], begin]) if shared else begin)
        token_ids += sample.token_ids[shared:]
        positions.append(torch.arange(shared, len(sample.token_ids)))
    return places, torch.tensor(token_ids), torch.cat(positions)

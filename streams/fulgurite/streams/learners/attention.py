"""Exact attention over sequences that lie end to end, without padding in the rest of the model.

    [1, H, N, D] tokens of B sequences, packed ─► each attends to its own sequence's earlier tokens ─► [1, N, H, D]

Sequences may have tokens in common: a prompt that is there once and begins many of them. Attention is then as if each
had its own, which costs what it would; everything else in the model sees the prompt once.

Promises: no token sees one of another sequence, whatever the model's mask code thinks: no mask is made at all. On a GPU
in half precision torch's variable-length flash kernel does it, for heads that it takes; elsewhere the tokens are spread
over [B, H, T_max, D] for the attention alone, causal, with padding on the right, so that padding is seen by nobody.
Does not know what the tokens are, nor which model asks: any that reaches attention through transformers'
AttentionInterface.

Elsewhere padding costs by the square of lengths, so sequences are spread in buckets: none is longer than its bucket's
shortest by more than a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from fulgurite.schemas.errors import SettingsError

NAME: Final = "fulgurite_packed"
"""As `attn_implementation` of a model."""

_HALF: Final = (torch.float16, torch.bfloat16)
MOST_HEAD_SIZE: Final = 256
"""That the flash kernel takes."""
LEAST_FILL: Final = 0.75
"""Of the longest sequence of a bucket, that its shortest has."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of about one length."""

    sequences: int
    longest: int
    tokens: Tensor
    """[n] int64: which of the packed tokens are theirs. A token that sequences have in common is each one's."""
    slots: Tensor
    """[n] int64: where each lies in [sequences, longest], flattened."""
    out_tokens: Tensor
    """[m] int64: those whose result is taken from this bucket: every token's is taken once."""
    out_slots: Tensor
    """[m] int64."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sequences lie: made once a micro-batch, used by every layer."""

    starts: Tensor
    """[B + 1] int32: sequence b is starts[b]..starts[b + 1] - 1, each with all of its tokens."""
    longest: int
    buckets: tuple[Bucket, ...]
    """Every sequence is in one."""
    places: Tensor | None = None
    """[starts[B]] int64: where the tokens of all sequences, one after the other, are among the packed ones; None where
    nothing is in common."""
    firsts: Tensor | None = None
    """[N] int64: where each packed token is first in `places`; None with it."""

    def to(self, device: torch.device) -> Layout:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        buckets = [
            Bucket(b.sequences, b.longest, *(t.to(device) for t in (b.tokens, b.slots, b.out_tokens, b.out_slots)))
            for b in self.buckets
        ]
        starts = self.starts.to(device)
        return Layout(starts, self.longest, tuple(buckets), moved(self.places), moved(self.firsts))


def layout_of(lengths: list[int], places: Tensor | None = None) -> Layout:
    """Of sequences of these lengths, each at least 1, in this order. `places` as in Layout: without it they lie end to
    end."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"sequences have at least one token: {lengths}")
    firsts = None if places is None else _firsts(places)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    by_length = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    buckets: list[Bucket] = []
    while by_length:
        longest = lengths[by_length[0]]
        members = [number for number in by_length if lengths[number] >= LEAST_FILL * longest]
        by_length = by_length[len(members) :]
        sizes = torch.tensor([lengths[number] for number in members])
        rows = torch.repeat_interleave(torch.arange(len(members)), sizes)
        within = torch.arange(len(rows)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        at = torch.repeat_interleave(starts[torch.tensor(members)], sizes) + within
        slots = rows * longest + within
        if places is None or firsts is None:
            buckets.append(Bucket(len(members), longest, at, slots, at, slots))
        else:
            tokens = places[at]
            mine = firsts[tokens] == at
            buckets.append(Bucket(len(members), longest, tokens, slots, tokens[mine], slots[mine]))
    return Layout(starts.to(torch.int32), max(lengths), tuple(buckets), places, firsts)


def _firsts(places: Tensor) -> Tensor:
    """[N]: where each of 0..N - 1 is first."""
    nowhere = torch.full((int(places.max()) + 1,), len(places))
    return nowhere.scatter_reduce(0, places, torch.arange(len(places)), "amin")


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]. transformers' attention interface; `layout`
    comes from the keyword arguments of the model's forward. Raises SettingsError for what would not be exact."""
    if layout is None:
        raise SettingsError(f"a model with {NAME} attention needs layout=…, the lengths of its packed sequences")
    if attention_mask is not None or dropout:
        raise SettingsError("packed attention takes neither a mask nor dropout: put the model into eval()")
    if softcap is not None or s_aux is not None:
        what = "caps its attention's scores (softcap)" if softcap is not None else "has attention sinks (s_aux)"
        raise SettingsError(f"{type(module).__name__} {what}: packed attention has no such thing")
    if sliding_window is not None and layout.longest > sliding_window:
        raise SettingsError(
            f"{type(module).__name__} attends to {sliding_window} tokens only and the longest sequence has "
            f"{layout.longest}: packed attention is full attention; bound the sequences' length"
        )
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # Norms and rotary embeddings leave float32 behind; the attention itself would be cast anyway.
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if query.is_cuda and query.dtype in _HALF and fits_flash(query.shape[-1], value.shape[-1]):
        return _flash(query, key, value, scaling, layout), None
    return _spread(query, key, value, scaling, layout), None


def fits_flash(head_size: int, value_size: int) -> bool:
    """Whether the kernel takes heads of these sizes; latent attention (DeepSeek) has values of a size of their own."""
    return head_size == value_size and head_size <= MOST_HEAD_SIZE and head_size % 8 == 0


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not at the top: it brings torch's compiler, seconds of CPU

    out = varlen_attn(
        _each_its_own(query, layout),
        _each_its_own(key, layout),
        _each_its_own(value, layout),
        layout.starts,
        layout.starts,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return (out if layout.firsts is None else out[layout.firsts]).unsqueeze(0)


def _each_its_own(packed: Tensor, layout: Layout) -> Tensor:
    """[1, H, N, D] -> [starts[B], H, D]: every sequence with all of its tokens."""
    tokens = packed.squeeze(0).transpose(0, 1)
    return tokens if layout.places is None else tokens[layout.places]


def _spread(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    # [1, H, N, D] -> [N, H, D]
    query, key, value = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
    parts: list[Tensor] = []
    for bucket in layout.buckets:
        out = functional.scaled_dot_product_attention(
            _padded(query, bucket),
            _padded(key, bucket),
            _padded(value, bucket),
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        flat = out.transpose(1, 2).reshape(bucket.sequences * bucket.longest, query.shape[1], -1)
        parts.append(flat[bucket.out_slots])
    tokens = torch.cat([bucket.out_tokens for bucket in layout.buckets])
    together = torch.cat(parts)
    return torch.empty_like(together).index_copy(0, tokens, together).unsqueeze(0)


def _padded(packed: Tensor, bucket: Bucket) -> Tensor:
    """[N, H, D] -> [sequences, H, longest, D] of the bucket's, zeros where no token is."""
    heads, size = packed.shape[1], packed.shape[2]
    spread = packed.new_zeros(bucket.sequences * bucket.longest, heads, size)
    spread = spread.index_copy(0, bucket.slots, packed[bucket.tokens])
    return spread.view(bucket.sequences, bucket.longest, heads, size).transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)

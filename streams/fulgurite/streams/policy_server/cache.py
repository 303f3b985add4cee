"""Keys and values of the requests under way: one preallocated tensor, one row per request.

A row's positions 0..n-1 hold its first n tokens, so rows of different lengths decode together, each masked to its own
length. transformers' attention layers call `update` and nothing else; what it does is prepared before each forward.
It is only ever written from tokens of the request that owns the row and dropped as a whole when weights change: there
is no prefix cache, so nothing can go stale. Knows nothing of weights or sampling.
"""

from __future__ import annotations

import torch

_GROW_BY = 64
"""Positions are reserved in steps of this many: few reallocations, little waste."""


class KeyValueCache:
    def __init__(self, layers: int, heads: int, width: int) -> None:
        self._layers, self._heads, self._width = layers, heads, width
        self._data = torch.empty(layers, 2, 0, heads, 0, width)
        self._prefilling: tuple[slice, slice] | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        self._positions = self._rows
        self._length = 0

    def reserve(self, rows: int, length: int) -> None:
        """Makes room; what is there stays."""
        old_rows, old_length = self._data.shape[2], self._data.shape[4]
        if rows <= old_rows and length <= old_length:
            return
        rows = max(old_rows, rows)
        length = max(old_length, -(-length // _GROW_BY) * _GROW_BY)
        # Zeros: a masked position counts with weight 0, and 0 times garbage may be NaN.
        data = torch.zeros(self._layers, 2, rows, self._heads, length, self._width)
        data[:, :, :old_rows, :, :old_length] = self._data
        self._data = data

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target`."""
        self._data[:, :, target] = self._data[:, :, source]

    def prepare_prefill(self, first_row: int, rows: int, length: int) -> None:
        """The next forward reads `length` tokens of `rows` new rows, from position 0."""
        self._prefilling = (slice(first_row, first_row + rows), slice(0, length))

    def prepare_decode(self, positions: torch.Tensor, length: int) -> None:
        """The next forward reads one token of rows 0..n-1 at these positions, attending to the first `length`."""
        self._prefilling = None
        self._rows = torch.arange(len(positions))
        self._positions = positions
        self._length = length

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with [rows, heads, new tokens, width]; gives what to attend to."""
        stored_keys, stored_values = self._data[layer, 0], self._data[layer, 1]
        if self._prefilling is not None:
            rows, length = self._prefilling
            stored_keys[rows, :, length] = keys
            stored_values[rows, :, length] = values
            return keys, values
        stored_keys[self._rows, :, self._positions] = keys[:, :, 0]
        stored_values[self._rows, :, self._positions] = values[:, :, 0]
        count = len(self._rows)
        return stored_keys[:count, :, : self._length], stored_values[:count, :, : self._length]


def prefill_mask(length: int) -> torch.Tensor:
    """[1, 1, length, length], causal. Padding stands on the right, where no real token looks."""
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def decode_mask(positions: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, 1, 1, length]: each row sees its own positions up to its new token."""
    return (torch.arange(length)[None] <= positions[:, None])[:, None, None]

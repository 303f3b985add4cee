"""The lines of many records as one Arrow array, each byte copied once: what split_lines says, for whole batches.

Most records are of objects that begin with { and end with }, one a line. Their line feeds are found and left out by
vectorised code, which makes no Python object of a line; all others go through split_lines. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fulgurite.schemas.codec import split_lines

_WORTH_BYTES: Final = 2_048
"""Of a smaller record the lines are split sooner than numpy is called."""
_LINE_FEED, _OPEN, _CLOSE = (ord(char) for char in "\n{}")


@dataclass(frozen=True, slots=True)
class Lines:
    """Of records, in their order."""

    raw: pa.Array
    numbers: npt.NDArray[np.uint32]
    """Of each line, in its record."""
    counts: npt.NDArray[np.int32]
    """Of lines, by record."""


def all_lines(values: Sequence[bytes]) -> Lines:
    """Every record has a line at least."""
    if not any(b"\n" in value for value in values):
        return _one_each(values)
    data = bytearray(sum(map(len, values)))
    view = memoryview(data)
    at = 0
    lengths: list[int] = []
    counts: list[int] = []
    uneven: list[tuple[int, Sequence[int]]] = []
    for place, value in enumerate(values):
        if b"\n" not in value:
            stripped = value
            lengths.append(len(value))
            counts.append(1)
        elif (found := _even(value)) is not None:
            stripped, line_lengths = found
            lengths += line_lengths
            counts.append(len(line_lengths))
        else:
            numbers, lines = split_lines(value)
            stripped = b"".join(lines)
            lengths += map(len, lines)
            counts.append(len(lines))
            uneven.append((place, numbers))
        view[at : at + len(stripped)] = stripped
        at += len(stripped)
    by_record = np.array(counts, np.int32)
    begins = np.cumsum(by_record) - by_record
    numbers = (np.arange(len(lengths)) - np.repeat(begins, by_record)).astype(np.uint32)
    for place, known in uneven:
        numbers[begins[place] : begins[place] + len(known)] = known
    return Lines(_array(data, np.array(lengths, np.int32)), numbers, by_record)


def _one_each(values: Sequence[bytes]) -> Lines:
    """Of records that are one line each."""
    count = len(values)
    lengths = np.fromiter(map(len, values), np.int32, count)
    return Lines(_array(b"".join(values), lengths), np.zeros(count, np.uint32), np.ones(count, np.int32))


def _array(data: bytes | bytearray, lengths: npt.NDArray[np.int32]) -> pa.Array:
    """The texts that lie in `data` one after the other."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.Array.from_buffers(pa.binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _even(value: bytes) -> tuple[bytes, list[int]] | None:
    """The lines without their line feeds, and their lengths, where each is an object from its first to its last byte;
    one line feed may end the record."""
    if len(value) < _WORTH_BYTES:
        return None
    if value[-1] == _LINE_FEED:
        value = value[:-1]
    chars = np.frombuffer(value, np.uint8)
    ends = np.flatnonzero(chars == _LINE_FEED)
    if chars[0] != _OPEN or chars[-1] != _CLOSE:
        return None
    # Before and after each line feed there is something: the record neither begins nor ends with one.
    if (chars[ends - 1] != _CLOSE).any() or (chars[ends + 1] != _OPEN).any():
        return None
    bounds = np.concatenate(([-1], ends, [len(value)]))
    return value.replace(b"\n", b""), (np.diff(bounds) - 1).tolist()

"""The lines of many records as one Arrow array: what split_lines says, for whole batches.

Most records are of objects that begin with { and end with }, one a line. Their line feeds are found and left out
without a Python object for a line; all others go through split_lines. Pure, but for the memory (kept.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fulgurite.consumers.materialiser.kept import Kept
from fulgurite.schemas.codec import split_lines

_TOGETHER: Final = 1_000
"""Records of one line that are joined before they are copied: as many as stay in the processor's cache."""
_WORTH_BYTES: Final = 16_384
"""In a smaller record they are counted sooner than numpy is called; in a large one numpy takes a third of the time."""
_kept: Final = Kept()
_LINE_FEED, _OPEN, _CLOSE = (ord(char) for char in "\n{}")


@dataclass(frozen=True, slots=True)
class Lines:
    """Of records, in their order."""

    raw: pa.Array
    numbers: npt.NDArray[np.uint32]
    """Of each line, in its record."""
    counts: npt.NDArray[np.int32]
    """Of lines, by record."""


def line_feeds(value: bytes) -> int:
    """How many there are."""
    if len(value) < _WORTH_BYTES:
        return value.count(b"\n")
    return int(np.count_nonzero(np.frombuffer(value, np.uint8) == _LINE_FEED))


def all_lines(values: Sequence[bytes]) -> Lines:
    """Every record has a line at least."""
    if not any(b"\n" in value for value in values):
        return _one_each(values)
    data = _kept.take(sum(map(len, values)))
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
        data[at : at + len(stripped)] = stripped
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
    data = _kept.take(int(lengths.sum()))
    at = 0
    for begin in range(0, count, _TOGETHER):
        some = b"".join(values[begin : begin + _TOGETHER])
        data[at : at + len(some)] = some
        at += len(some)
    return Lines(_array(data, lengths), np.zeros(count, np.uint32), np.ones(count, np.int32))


def _array(data: memoryview, lengths: npt.NDArray[np.int32]) -> pa.Array:
    """The texts that lie in `data` one after the other."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.Array.from_buffers(pa.binary(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _even(value: bytes) -> tuple[bytes, list[int]] | None:
    """The lines without their line feeds, and their lengths, where each is an object from its first to its last byte;
    one line feed may end the record."""
    end = len(value) - (value[-1] == _LINE_FEED)
    if value[0] != _OPEN or value[end - 1] != _CLOSE:
        return None
    lengths: list[int] = []
    begin = 0
    while 0 <= (at := value.find(b"\n", begin)) < end:
        # There is a byte after it: the last before `end` is no line feed.
        if value[at - 1] != _CLOSE or value[at + 1] != _OPEN:
            return None
        lengths.append(at - begin)
        begin = at + 1
    lengths.append(end - begin)
    return value.replace(b"\n", b""), lengths

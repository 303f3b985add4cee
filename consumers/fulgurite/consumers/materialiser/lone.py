"""Records that alone need more memory than the server has: when one is given up, and when records go one by one.

An insert of the least size that needed too much memory may hold such a record: its records then go one at a time, until
all had their turn. A failure of one alone counts where nothing else of ours was being inserted meanwhile, or where the
server says that the bound of one query was reached, which others' inserts have no part in. At the TRIES-th, and not
before SECONDS after the first, the record is hopeless. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from fulgurite.consumers.materialiser.blocks import Partition, Slice

TRIES: Final = 6
SECONDS: Final = 60.0
_OF_ONE_QUERY: Final = "Query memory limit exceeded"

_Place = tuple[Partition, int]


class Lone:
    """Of one topic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[_Place, tuple[int, float]] = {}
        self._singly = 0

    @property
    def singly(self) -> bool:
        """Whether the next insert takes one record."""
        return self._singly > 0

    def failed(self, slices: Sequence[Slice], error: str, *, least: bool, alone: bool) -> None:
        """An insert needed too much memory. `least`: it will not be made smaller; `alone`: there was no other."""
        if (count := sum(len(part.records) for part in slices)) > 1:
            self._singly = count if least else 0
        elif alone or _OF_ONE_QUERY in error:
            tries, since = self._failures.get(_place(slices), (0, self._clock()))
            self._failures[_place(slices)] = (tries + 1, since)

    def done(self, slices: Sequence[Slice]) -> None:
        """They are in."""
        self._singly = max(0, self._singly - sum(len(part.records) for part in slices))
        if self._failures:
            for part in slices:
                for record in part.records:
                    self._failures.pop((part.partition, record.offset), None)

    def hopeless(self, slices: Sequence[Slice]) -> str:
        """Why the one record becomes a dead letter. Empty: it does not. Of one that has rows the rest is tried on: as a
        dead letter it would be there twice."""
        if not self._failures or sum(len(part.records) for part in slices) != 1:
            return ""
        tries, since = self._failures.get(_place(slices), (0, 0.0))
        seconds = self._clock() - since
        if tries < TRIES or seconds < SECONDS or slices[0].present:
            return ""
        return (
            f"alone it needs more memory than ClickHouse has for an insert (tried {tries} times in {seconds:.0f} s): "
            "send fewer spans a record, or shorter attributes of the resource, which each span gets"
        )


def _place(slices: Sequence[Slice]) -> _Place:
    return slices[0].partition, slices[0].records[0].offset

"""Records that alone fail because of memory or time: when records go one by one, how much more time one gets, and when
one is given up.

An insert of the least size that failed so may hold such a record: its records then go one at a time, until all had
their turn. What a failure of one alone says depends on how large it becomes in ClickHouse (weight.py): a server that is
short of memory, or slow for everybody, refuses small records as well.

    memory    The server says that the bound of one query was reached, in which nobody else has a part; or it names a
              bound of all, of which the record is PART_ALONE and nothing of ours beside it counted, or PART_ALWAYS.
              Where it names none: UNKNOWN_BYTES. At the TRIES-th such failure, and not before SECONDS after the
              first, the record is hopeless.
    time      One of HEAVY_BYTES gets twice the time at each try, up to MOST_TIMES what others get. At the SLOW_TRIES-th
              failure with most time it is hopeless if it has HOPELESS_BYTES.

Any other record is tried for ever. One that failed so goes alone from then on, and one such record at a time: its
partition waits for it, nobody else's does. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fulgurite.consumers.materialiser.blocks import TOO_LARGE, TOO_SLOW, Partition, Slice
from fulgurite.consumers.materialiser.errors import TooLarge, TooSlow, Unavailable

TRIES: Final = 6
SECONDS: Final = 60.0
PART_ALONE: Final = 1 / 10
PART_ALWAYS: Final = 1 / 2
"""An insert needs two to six times the bytes of its rows, more where there are rules of redaction."""
UNKNOWN_BYTES: Final = 512 << 20

HEAVY_BYTES: Final = 1 << 20
MOST_TIMES: Final = 16
SLOW_TRIES: Final = 3
HOPELESS_BYTES: Final = 32 << 20

_OF_ONE_QUERY: Final = ("Query memory limit exceeded", "Memory limit (for query) exceeded")
_LIMIT: Final = re.compile(r"maximum: ([0-9.]+) ([KMGTP]?)i?B")

_Place = tuple[Partition, int]


@dataclass(slots=True)
class _Failing:
    bytes: int
    tries: int = 0
    large: int = 0
    """Failures that say that it needs too much memory."""
    since: float = 0.0
    """When the first of them was."""
    times: int = 1
    """As much time as others get."""
    slow: int = 0
    """Failures with most time."""


class Lone:
    """Of one topic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failing: dict[_Place, _Failing] = {}
        self._singly = 0

    @property
    def singly(self) -> bool:
        """Whether the next insert takes one record."""
        return self._singly > 0

    def suspects(self, partition: Partition, offset: int) -> bool:
        """Whether the record goes alone."""
        return bool(self._failing) and (partition, offset) in self._failing

    def tries(self, slices: Sequence[Slice]) -> int:
        """Failures of the one record that is suspected; 0 of any others."""
        return found.tries if (found := self._found(slices)) else 0

    def times(self, slices: Sequence[Slice]) -> int:
        """How much more time they get than others."""
        return found.times if (found := self._found(slices)) else 1

    def failed_together(self, slices: Sequence[Slice], *, least: bool) -> None:
        """An insert of several records needed too much memory or time. `least`: it will not be made smaller."""
        self._singly = _count(slices) if least else 0

    def failed(self, slices: Sequence[Slice], error: Unavailable, weight: int, *, alone: bool) -> None:
        """The insert of one record did. `weight`: its bytes as rows; `alone`: no other insert of ours counted."""
        large = isinstance(error, TooLarge) and _says_too_large(str(error), weight, alone=alone)
        found = self._found(slices)
        if found is None:
            if weight < HEAVY_BYTES and not large:
                return
            found = self._failing[_place(slices)] = _Failing(weight)
        found.tries += 1
        if large:
            found.since = found.since if found.large else self._clock()
            found.large += 1
        if isinstance(error, TooSlow):
            found.slow += found.times == MOST_TIMES
            found.times = min(2 * found.times, MOST_TIMES) if weight >= HEAVY_BYTES else 1

    def done(self, slices: Sequence[Slice]) -> None:
        """They are in."""
        self._singly = max(0, self._singly - _count(slices))
        if self._failing:
            for part in slices:
                for record in part.records:
                    self._failing.pop((part.partition, record.offset), None)

    def hopeless(self, slices: Sequence[Slice]) -> tuple[str, str] | None:
        """The reason and the message with which the one record becomes a dead letter. Of one that has rows the rest is
        tried on: as a dead letter it would be there twice."""
        found = self._found(slices)
        if found is None or slices[0].present:
            return None
        seconds, size = self._clock() - found.since, f"{found.bytes / 2**20:.0f} MiB as rows"
        advice = "send fewer spans a record, or shorter attributes of the resource, which each span gets"
        if found.large >= TRIES and seconds >= SECONDS:
            what = f"alone it ({size}) needs more memory than ClickHouse has for an insert"
            return TOO_LARGE, f"{what} (tried {found.large} times in {seconds:.0f} s): {advice}"
        if found.slow >= SLOW_TRIES and found.bytes >= HOPELESS_BYTES:
            what = f"alone it ({size}) takes ClickHouse longer than {MOST_TIMES} times materialiser.insert_seconds"
            return TOO_SLOW, f"{what} (tried {found.slow} times with so much): {advice}"
        return None

    def _found(self, slices: Sequence[Slice]) -> _Failing | None:
        if not self._failing or _count(slices) != 1:
            return None
        return self._failing.get(_place(slices))


def _says_too_large(error: str, weight: int, *, alone: bool) -> bool:
    if any(text in error for text in _OF_ONE_QUERY):
        return True
    if (limit := _LIMIT.search(error)) is None:
        return weight >= UNKNOWN_BYTES
    bound = float(limit[1]) * 1024 ** " KMGTP".index(limit[2] or " ")
    return weight >= PART_ALWAYS * bound or (alone and weight >= PART_ALONE * bound)


def _count(slices: Sequence[Slice]) -> int:
    return sum(len(part.records) for part in slices)


def _place(slices: Sequence[Slice]) -> _Place:
    return slices[0].partition, slices[0].records[0].offset

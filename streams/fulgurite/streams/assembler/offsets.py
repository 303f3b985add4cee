"""Where each input partition stands, and what a restart must read again: pure bookkeeping of offsets.

Three offsets of a `spans` or `rewards` partition (the first is the committed offset, the others its metadata):

        needed_from          unknown_from         read_to
    ────────┬────────────────────┬───────────────────┬──────────► log
            │ records of open rollouts among used ones │ never read
            └ a restart reads again from here          └ … and is up to date here

    needed_from   the oldest record of a rollout that has not been emitted
    read_to       everything before it was dealt with, or belongs to a rollout that is still open
    unknown_from  the oldest record whose rollout nobody has announced yet; before it such records were dead-lettered

Four of a `rollouts` partition:

    emit_from     the oldest `finished` without its trajectory: trajectories are emitted in the order of this log, so
                  this one number says which exist, and nothing has to be looked up in `trajectories`
    ahead         but for rollouts that wait for a reward in OTLP (waits.py): others behind them do not wait. These are
                  the `finished` after emit_from that have their trajectory, as a bitmap of the MAX_AHEAD offsets there
    read_to       events before it had been read
    replay_from   from here events are read again, only to know which rollouts are open and which have ended

So, when a restart reads a record before `read_to` again: its rollout is open (an event since replay_from says so): keep
it. Else it was dealt with, unless it is at or after unknown_from and its rollout has not ended: then it waits on.
"""

from __future__ import annotations

import base64
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aiokafka.structs import OffsetAndMetadata, TopicPartition
from pydantic import BaseModel, Field, ValidationError

from fulgurite.streams.assembler.rollouts import Ended, Held, Pending

RECENT_EVENTS = 10_000
"""Lifecycle events read again at least: late records and repeated `finished` events of just before are recognised."""

MAX_REPLAY_EVENTS = 200_000
"""Lifecycle events (of a partition) read again only for the labels of rollouts still in the queue: seconds to read."""

MAX_AHEAD = 12_288
"""How far behind the oldest `finished` without its trajectory others may have theirs: in base64 2 of the 4 kB that
brokers allow for the metadata of an offset (offset.metadata.max.bytes)."""

M = TypeVar("M", bound="_Marks")


class _Marks(BaseModel):
    """The metadata beside a committed offset. Unreadable (offsets reset by an operator) means: nothing was open."""

    read_to: int = Field(default=0, ge=0)


class DataMarks(_Marks):
    unknown_from: int = Field(default=0, ge=0)


class RolloutsMarks(_Marks):
    replay_from: int = Field(default=0, ge=0)
    ahead: str = Field(default="", pattern=r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$")


@dataclass(slots=True)
class DataPartition:
    """One partition of `spans` or `rewards`."""

    tp: TopicPartition
    position: int
    read_to: int
    """Of the last commit before the start: below it records are being read again."""
    unknown_from: int
    held: deque[Held] = field(default_factory=deque[Held])
    unknown: deque[Held] = field(default_factory=deque[Held])

    @classmethod
    def restored(cls, tp: TopicPartition, committed: OffsetAndMetadata | None, begin: int) -> DataPartition:
        if committed is None:
            return cls(tp, begin, begin, begin)
        marks = _parse(DataMarks, committed.metadata) or DataMarks(
            read_to=committed.offset, unknown_from=committed.offset
        )
        return cls(tp, max(committed.offset, begin), marks.read_to, marks.unknown_from)

    @property
    def replaying(self) -> bool:
        return self.position < self.read_to

    def first_unknown(self, is_known: Callable[[str], bool]) -> int:
        while self.unknown and (self.unknown[0].done or is_known(self.unknown[0].rollout_id)):
            self.unknown.popleft()
        return self.unknown[0].offset if self.unknown else self.position

    def commit_point(self, is_known: Callable[[str], bool]) -> OffsetAndMetadata:
        while self.held and self.held[0].done:
            self.held.popleft()
        needed_from = self.held[0].offset if self.held else self.position
        marks = DataMarks(read_to=self.position, unknown_from=self.first_unknown(is_known))
        return OffsetAndMetadata(needed_from, _format(marks))


@dataclass(slots=True)
class RolloutsPartition:
    """One partition of `rollouts`."""

    tp: TopicPartition
    position: int
    emit_from: int
    """Of the last commit before the start: earlier `finished` events have their trajectory."""
    read_to: int
    begin: int = 0
    pending: deque[Pending] = field(default_factory=deque[Pending])
    """In the order of the log: the first one has no trajectory yet, of those behind it some may have."""
    ahead: set[int] = field(default_factory=set[int])
    """After next_emission: `finished` events that have their trajectory."""
    holds: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """Heap of (offset, rollout_id): events without which an open rollout would not be known after a restart."""
    pins: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """Heap of (offset, rollout_id): ends without which a record read again would be taken for an unknown rollout's."""
    _overtaking: int = 0
    """How many of `pending` have their trajectory."""

    @classmethod
    def restored(cls, tp: TopicPartition, committed: OffsetAndMetadata | None, begin: int) -> RolloutsPartition:
        if committed is None:
            return cls(tp, begin, begin, begin, begin)
        marks = _parse(RolloutsMarks, committed.metadata) or RolloutsMarks(
            read_to=committed.offset, replay_from=max(0, committed.offset - RECENT_EVENTS)
        )
        ahead = _unpacked(committed.offset, marks.ahead)
        return cls(tp, max(marks.replay_from, begin), committed.offset, marks.read_to, begin, ahead=ahead)

    @property
    def replaying(self) -> bool:
        return self.position < self.read_to

    @property
    def next_emission(self) -> int:
        return self.pending[0].offset if self.pending else self.position

    @property
    def unsent(self) -> int:
        """How many are pending."""
        return len(self.pending) - self._overtaking

    def is_emitted(self, offset: int) -> bool:
        """Of a `finished` that is read again: whether it has its trajectory."""
        return offset < self.emit_from or offset in self.ahead

    def emitted(self, pending: Pending) -> None:
        """It has its trajectory as of now."""
        pending.done = True
        self._overtaking += 1
        self.ahead.add(pending.offset)
        while self.pending and self.pending[0].done:
            self.pending.popleft()
            self._overtaking -= 1

    def hold(self, offset: int, rollout_id: str) -> None:
        heapq.heappush(self.holds, (offset, rollout_id))

    def commit_point(self) -> OffsetAndMetadata:
        """`holds` and `pins` must have been pruned."""
        emit_from = self.next_emission
        replay_from = max(self.begin, emit_from - RECENT_EVENTS)
        for heap in (self.holds, self.pins):
            if heap:
                replay_from = min(replay_from, heap[0][0])
        self.ahead = {offset for offset in self.ahead if offset > emit_from}
        marks = RolloutsMarks(read_to=self.position, replay_from=replay_from, ahead=_packed(emit_from, self.ahead))
        return OffsetAndMetadata(emit_from, _format(marks))


def may_overtake(offset: int, oldest: int) -> bool:
    """Whether there is room to say that this one has its trajectory, and the oldest one that stays behind has not."""
    return offset - oldest <= MAX_AHEAD


class EndedRollouts:
    """Tells late from unknown. The oldest are forgotten beyond `limit`, but none that a restart still needs."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ended: dict[str, Ended] = {}

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._ended

    def get(self, rollout_id: str) -> Ended | None:
        return self._ended.get(rollout_id)

    def restore(self, rollout_id: str, ended: Ended) -> None:
        """While records are being read again: none is forgotten, for what is read next may be of any of them."""
        self._ended[rollout_id] = ended

    def add(self, rollout_id: str, ended: Ended) -> None:
        self._ended[rollout_id] = ended
        while len(self._ended) > self._limit:
            oldest = next(iter(self._ended))
            if self._ended[oldest].pinned:
                break
            del self._ended[oldest]

    def pin(self, part: RolloutsPartition, rollout_id: str, ended: Ended) -> None:
        """A restart must read its end again: a record of it may lie where unknown ones wait."""
        if not ended.pinned:
            ended.pinned = True
            heapq.heappush(part.pins, (ended.offset, rollout_id))

    def prune(self, part: RolloutsPartition, unknown_from: Mapping[TopicPartition, int]) -> None:
        """Lets go of pins whose records lie before all that are unknown."""
        while part.pins:
            ended = self._ended[part.pins[0][1]]
            if any(offset >= unknown_from[tp] for tp, offset in ended.last.items()):
                break
            ended.pinned = False
            heapq.heappop(part.pins)


def _packed(emit_from: int, ahead: Iterable[int]) -> str:
    """Bit n is offset emit_from + 1 + n; nothing where there are none.

    >>> _packed(10, [11, 20]), sorted(_unpacked(10, _packed(10, [11, 20])))
    ('AQI=', [11, 20])
    """
    bits = bytearray()
    for offset in sorted(ahead):
        byte, bit = divmod(offset - emit_from - 1, 8)
        assert 0 <= byte < MAX_AHEAD // 8, "may_overtake() was not asked"
        bits.extend(bytes(byte + 1 - len(bits)))
        bits[byte] |= 1 << bit
    return base64.b64encode(bits).decode()


def _unpacked(emit_from: int, packed: str) -> set[int]:
    bits = base64.b64decode(packed)
    return {emit_from + 1 + 8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


def _format(marks: _Marks) -> str:
    return json.dumps(marks.model_dump(), separators=(",", ":"))


def _parse(model: type[M], metadata: str) -> M | None:
    try:
        return model.model_validate_json(metadata)
    except ValidationError:
        return None

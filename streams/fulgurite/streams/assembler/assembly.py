"""Which rollouts are open, which have ended, and what to do with each record: the assembler's state, without Kafka.

    lifecycle()  an event of `rollouts`         ─► open rollouts ─► finished: pending, in the order of the log
    record()     a span or a reward             ─► held with its rollout, or late, or waiting for an announcement
    passed()     how far a partition was read   ─► barriers
    ready()      barriers passed                ─► may be taken, or waits for a reward in OTLP (waits.py)
    take()       everything that can be said now: trajectories, dead letters, and the offsets that go with them

Promises: what take() returned is final in this state, so the caller commits exactly that or ends the process. Whatever
the interleaving of the inputs, a record is in its rollout's trajectory, or late, or of an unknown rollout: one of them,
once.

- The join is by the rollout_id in the value, over all partitions. So a record that another client put into
  a wrong partition is joined like any other (and counted), and the barrier, which covers every partition, is exact for
  it too. This needs one owner of all partitions: assemblers that share them would have to forward such records first.
- A rollout is known while any event of it is remembered. What is remembered for certain: rollouts with an attempt
  running or with records held. A rollout that only waits in the queue is remembered for the labels of its `queued`
  event, and forgotten MAX_REPLAY_EVENTS later: its attempt_started announces it again before its first span, but its
  trajectory then lacks queued_ns and metadata.
- Ended rollouts are remembered, to tell late from unknown, up to MAX_ENDED; beyond it a late record counts as unknown.
- Memory: values are held up to max_open_rollouts and max_held_bytes; beyond, only coordinates are (about 300 bytes a
  record) and the value is read again when its rollout ends; what comes for it meanwhile is held. Reading on is never
  stopped for it: every barrier lies ahead, so a pause until rollouts end would wait for ever.

Known limit: a rollout announced only after its records had become dead letters as unknown gets them back into its
trajectory if the assembler restarts before it ends.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from aiokafka.partitioner import murmur2
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.rollouts import (
    AttemptHeartbeat,
    AttemptStarted,
    RolloutEvent,
    RolloutFinished,
    RolloutQueued,
    RolloutRequeued,
)
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.assembler.building import build, has_reward
from fulgurite.streams.assembler.join import Announcement
from fulgurite.streams.assembler.letters import LATE, LETTER_BYTES, UNKNOWN_ROLLOUT, of_lines
from fulgurite.streams.assembler.offsets import (
    MAX_REPLAY_EVENTS,
    DataPartition,
    EndedRollouts,
    RolloutsPartition,
    may_overtake,
)
from fulgurite.streams.assembler.rollouts import Batch, Ended, Held, OpenRollout, Pending
from fulgurite.streams.assembler.waits import Waits

MAX_ENDED = 100_000
MAX_HELD_BYTES = 512 << 20
MAX_UNSENT_BYTES = 64 << 20
"""Dead letters that wait for their transaction; beyond it spans and rewards are not read on."""
MAX_READ_AGAIN = 500
"""Records read again at once."""


class Assembly:
    """All open rollouts of all partitions."""

    def __init__(
        self,
        rollouts: Iterable[RolloutsPartition],
        spans: Iterable[DataPartition],
        rewards: Iterable[DataPartition],
        *,
        max_open_rollouts: int,
        orphan_seconds: float,
        max_held_bytes: int | None = None,
        max_ended: int = MAX_ENDED,
        keep_spans: bool = False,
        waits: Waits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rollouts = {part.tp: part for part in rollouts}
        spans = list(spans)
        self.data = {part.tp: part for part in (*spans, *rewards)}
        self.open: dict[str, OpenRollout] = {}
        self.ended = EndedRollouts(max_ended)
        self.waits = Waits(wait_seconds=0.0, settle_seconds=0.0, clock=clock) if waits is None else waits
        self.counts: Counter[str] = Counter()
        self.held_bytes = 0
        self.holding = 0
        """Open rollouts that have had a record."""
        self.unsent: list[DeadLetter] = []
        self.unsent_bytes = 0
        self._span_partitions = {part.tp for part in spans}
        self._max_open = max_open_rollouts
        self._max_bytes = MAX_HELD_BYTES if max_held_bytes is None else max_held_bytes
        self._orphan_seconds = orphan_seconds
        self._keep_spans = keep_spans
        self._clock = clock
        self._committed: dict[TopicPartition, OffsetAndMetadata] = {}

    @property
    def replaying(self) -> bool:
        """Whether records from before the last commit are still being read again; nothing may be taken until then."""
        return any(part.replaying for part in (*self.rollouts.values(), *self.data.values()))

    @property
    def pending(self) -> int:
        return sum(part.unsent for part in self.rollouts.values())

    def passed(self, tp: TopicPartition, position: int) -> None:
        """The partition was read up to here: also past what is not a record (transaction markers, aborted ones)."""
        part = self.rollouts.get(tp) or self.data[tp]
        part.position = max(part.position, position)

    def lifecycle(
        self, tp: TopicPartition, offset: int, event: RolloutEvent, key: bytes | None = None, value: bytes | None = None
    ) -> Pending | None:
        """Gives the pending trajectory that now needs a barrier, if this event ends a rollout. `key`, `value`: of the
        record that it was."""
        part = self.rollouts[tp]
        if offset < part.position:
            return None
        part.position = offset + 1
        rollout_id = event.rollout_id
        if rollout_id in self.ended:
            return None
        if isinstance(event, RolloutFinished) and part.is_emitted(offset):
            self.ended.restore(rollout_id, Ended(event.attempt_id, tp, offset))
            self.open.pop(rollout_id, None)
            return None
        rollout = self.open.setdefault(rollout_id, OpenRollout())
        rollout.known = True
        rollout.latest = (tp, offset)
        if rollout.hold is None:
            rollout.hold = (tp, offset)
            part.hold(offset, rollout_id)
        match event:
            case RolloutQueued():
                rollout.announced = rollout.announced or Announcement(event.time_ns, event.metadata)
            case AttemptStarted() | AttemptHeartbeat():
                rollout.running = True
            case RolloutRequeued():
                rollout.running = False
                self._supersede(rollout, event.attempt_id)
            case RolloutFinished() if not rollout.finishing:
                rollout.finishing = True
                part.pending.append(Pending(event, tp, offset, key, value))
                return part.pending[-1]
            case _:
                pass
        return None

    def record(
        self,
        tp: TopicPartition,
        offset: int,
        key: bytes | None,
        value: bytes,
        attempts: Mapping[str, str],
    ) -> None:
        """Spans or rewards: almost always of one rollout, whose id is the key. `attempts`: rollout -> attempt."""
        part = self.data[tp]
        if offset < part.position:
            return
        replayed = part.replaying
        part.position = offset + 1
        for rollout_id, attempt_id in attempts.items():
            self._record(part, replayed, offset, key, value, rollout_id, attempt_id)

    def _record(
        self,
        part: DataPartition,
        replayed: bool,
        offset: int,
        key: bytes | None,
        value: bytes,
        rollout_id: str,
        attempt_id: str,
    ) -> None:
        tp = part.tp
        held = Held(tp, offset, rollout_id, attempt_id, key, value, self._clock() + self._orphan_seconds)
        ended = self.ended.get(rollout_id)
        if ended is not None:
            self._after_end(ended, held, replayed)
            return
        rollout = self.open.get(rollout_id)
        if replayed and offset < part.unknown_from and (rollout is None or not rollout.known):
            return  # Dealt with before the restart; see offsets.py.
        if rollout is None:
            rollout = self.open[rollout_id] = OpenRollout()
        self.counts["misrouted"] += murmur2(rollout_id.encode()) % 2**31 % len(self.rollouts) != tp.partition
        self.holding += not rollout.last
        rollout.last[tp] = offset
        (rollout.spans if tp in self._span_partitions else rollout.rewards).append(held)
        part.held.append(held)
        if not rollout.known:
            part.unknown.append(held)
        short = self.held_bytes + len(value) > self._max_bytes or self.holding > self._max_open
        if short and not rollout.recalled:
            held.value = None
            self.counts["spilled"] += 1
        else:
            self.held_bytes += len(value)

    def ready(self, limit: int) -> list[Pending]:
        """Those that may be taken now, at most `limit`, oldest first in each partition of `rollouts`.

        One whose barrier was passed, and whose reward may still be on its way as OTLP, begins to wait for it; those
        behind it do not.
        """
        found: list[Pending] = []
        for part in sorted(self.rollouts.values(), key=lambda part: -part.unsent):
            oldest: int | None = None
            for pending in part.pending:
                if len(found) >= limit:
                    break
                if pending.done:
                    continue
                if self._is_complete(pending) and (oldest is None or may_overtake(pending.offset, oldest)):
                    found.append(pending)
                    continue
                if not pending.asked:  # it has not passed its barrier, and those behind it have not, either
                    break
                oldest = pending.offset if oldest is None else oldest
        return found

    def spilled(self, ready: Sequence[Pending]) -> list[Held]:
        """Records whose value must be read again before these can be taken."""
        return [h for p in ready for h in self.open[p.event.rollout_id].held if h.value is None]

    def recall(self, ready: Sequence[Pending]) -> list[Held]:
        """The same, of those that are taken next: what comes for them while these are read again is not spilled."""
        for pending in ready:
            self.open[pending.event.rollout_id].recalled = True
        return self.spilled(ready)

    def read_again(self, held: Held, value: bytes) -> None:
        """The value of a spilled record."""
        held.value = value
        self.held_bytes += len(value)

    def expire(self, caught_up: float) -> list[Held]:
        """Records whose rollout nobody had announced when `rollouts` had been read up to its end at `caught_up`.

        Gives those whose value must be read again first; the others become dead letters.
        """
        spilled: list[Held] = []
        for part in self.data.values():
            part.first_unknown(self.is_known)
            while part.unknown and part.unknown[0].due <= caught_up and self.unsent_bytes < MAX_UNSENT_BYTES:
                held = part.unknown[0]
                if held.value is None and not held.done:
                    due = (other for other in part.unknown if other.due <= caught_up and other.value is None)
                    spilled += islice((other for other in due if not other.done), MAX_READ_AGAIN)
                    break
                part.unknown.popleft()
                if not held.done and not self.is_known(held.rollout_id):
                    self._orphan(held)
        return spilled

    def first_due(self) -> float | None:
        """When the first record will have waited too long for its rollout."""
        for part in self.data.values():
            part.first_unknown(self.is_known)
        return min((part.unknown[0].due for part in self.data.values() if part.unknown), default=None)

    def take(self, ready: Sequence[Pending]) -> Batch | None:
        """Trajectories of these, all dead letters so far, and the offsets after them; None if nothing has changed."""
        assert not self.replaying
        trajectories = [self._end(pending) for pending in ready]
        dead_letters, self.unsent, self.unsent_bytes = self.unsent, [], 0
        self._prune()
        points = {tp: part.commit_point() for tp, part in self.rollouts.items()}
        points |= {tp: part.commit_point(self.is_known) for tp, part in self.data.items()}
        offsets = {tp: point for tp, point in points.items() if self._committed.get(tp) != point}
        self._committed = points
        return Batch(trajectories, list(ready), dead_letters, offsets) if offsets else None

    def commit_all(self) -> None:
        """The next batch has the offsets of every partition, changed or not."""
        self._committed = {}

    def is_known(self, rollout_id: str) -> bool:
        rollout = self.open.get(rollout_id)
        return rollout.known if rollout is not None else rollout_id in self.ended

    def _reached(self, barrier: dict[TopicPartition, int] | None) -> bool:
        if barrier is None:
            return False
        for tp in [tp for tp, end in barrier.items() if self.data[tp].position >= end]:
            del barrier[tp]
        return not barrier

    def _is_complete(self, pending: Pending) -> bool:
        if pending.waits or not self._reached(pending.barrier):
            return False
        if not pending.asked:
            pending.asked = True
            pending.waits = self._begins_to_wait(pending)
        return not pending.waits

    def _begins_to_wait(self, pending: Pending) -> bool:
        """Asked once of a rollout, when all that is its own was read. What was spilled is taken for no reward: that
        costs time, and the other way round it would cost the rollout."""
        if not self.waits.in_use or pending.event.status != "succeeded":
            return False
        rewards = [held.value for held in self.open[pending.event.rollout_id].rewards if held.value is not None]
        if has_reward(pending, rewards):
            return False
        self.waits.begin(pending)
        self.counts["otlp_waited"] += 1
        return True

    def _end(self, pending: Pending) -> Trajectory:
        event = pending.event
        part = self.rollouts[pending.tp]
        part.emitted(pending)
        rollout = self.open.pop(event.rollout_id)
        self.holding -= bool(rollout.last)
        spans, rewards = ([h.value for h in held if h.value is not None] for held in (rollout.spans, rollout.rewards))
        assert len(spans) + len(rewards) == len(rollout.spans) + len(rollout.rewards)
        announced = rollout.announced or Announcement()
        joined, letter = build(pending, announced, spans, rewards, keep_spans=self._keep_spans)
        if letter is not None:
            self.counts[letter.reason] += 1
            self.unsent.append(letter)
        self.counts["trajectories"] += 1
        self.counts["invalid"] += joined.invalid
        for held in rollout.held:
            self._done(held)
        ended = Ended(event.attempt_id, part.tp, pending.offset, rollout.last)
        self.ended.add(event.rollout_id, ended)
        self.ended.pin(part, event.rollout_id, ended)
        return joined.trajectory

    def _after_end(self, ended: Ended, held: Held, replayed: bool) -> None:
        ended.last[held.tp] = held.offset
        self.ended.pin(self.rollouts[ended.tp], held.rollout_id, ended)
        if replayed:
            return
        if held.attempt_id not in (ended.attempt_id, ""):
            self.counts["superseded"] += 1
            return
        self._dead(held, LATE, f"rollout {held.rollout_id} had ended and its trajectory was emitted before this came")

    def _orphan(self, held: Held) -> None:
        rollout = self.open[held.rollout_id]
        seconds = self._orphan_seconds
        self._dead(held, UNKNOWN_ROLLOUT, f"nobody announced rollout {held.rollout_id} within {seconds:g} s")
        self._done(held)
        (rollout.spans if held.tp in self._span_partitions else rollout.rewards).remove(held)
        if not rollout.spans and not rollout.rewards:
            del self.open[held.rollout_id]
            self.holding -= 1

    def _dead(self, held: Held, reason: str, message: str) -> None:
        for letter in of_lines(held, reason, message):
            self.counts[reason] += 1
            self.unsent_bytes += len(letter.value or b"") + LETTER_BYTES
            self.unsent.append(letter)

    def _supersede(self, rollout: OpenRollout, attempt_id: str) -> None:
        """Spans of an attempt that is not the last are never used: let go of them while the rollout waits its turn."""
        if not attempt_id:
            return
        for held in rollout.spans:
            if held.attempt_id == attempt_id:
                self._done(held)
                self.counts["superseded"] += 1
        rollout.spans = [held for held in rollout.spans if not held.done]

    def _done(self, held: Held) -> None:
        held.done = True
        if held.value is not None:
            self.held_bytes -= len(held.value)
            held.value = None

    def _prune(self) -> None:
        """Lets go of pins and holds that no restart needs any more."""
        unknown_from = {tp: part.first_unknown(self.is_known) for tp, part in self.data.items()}
        for part in self.rollouts.values():
            self.ended.prune(part, unknown_from)
            while part.holds and self._let_go(part, *part.holds[0]):
                heapq.heappop(part.holds)

    def _let_go(self, part: RolloutsPartition, offset: int, rollout_id: str) -> bool:
        rollout = self.open.get(rollout_id)
        if rollout is None or rollout.hold != (part.tp, offset):
            return True
        if offset >= part.next_emission - MAX_REPLAY_EVENTS:
            return False
        needed = rollout.running or rollout.finishing or bool(rollout.spans or rollout.rewards)
        if not needed:
            del self.open[rollout_id]
            self.holding -= bool(rollout.last)
            return True
        assert rollout.latest is not None
        if rollout.latest == rollout.hold:
            return False
        rollout.hold = rollout.latest
        self.rollouts[rollout.latest[0]].hold(rollout.latest[1], rollout_id)
        return True

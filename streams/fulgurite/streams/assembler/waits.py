"""Which ended rollouts wait for a reward that may still be on its way as OTLP: for what, and how long at most. Pure.

Such a reward goes Collector ─► otlp_spans ─► translator ─► rewards, and nobody has it acknowledged on `rewards` before
the rollout's end. So a second barrier, for a rollout that has passed its first one and has no reward:

    finished ─► settle_seconds ─► ends of otlp_spans ─► the translator has committed them ─► ends of rewards ─► read
                what a Collector  asked for all that    it has published what it found,      asked for now: they
                has accepted is   are settled at once   then committed                       lie behind what it
                on otlp_spans                                                                published

Promises: a reward that was on otlp_spans when the rollout was settled is read before the rollout may be taken, however
long the translator was away, up to wait_seconds after it began to wait; then it is overdue, and counted. Who
waits keeps nobody else waiting, as long as there is room to overtake (MAX_AHEAD in offsets.py, MAX_PENDING in
service.py). Nobody waits where there is no translator (`in_use`).

Bounds: a rollout is in one place here, and MAX_PENDING (service.py) of them there are; a wave is a few numbers for each
partition of otlp_spans, and one begins with a question (translated.py says how often they are asked).

Does not know Kafka, which rollouts have their reward, or what becomes of them afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aiokafka.structs import TopicPartition

from fulgurite.streams.assembler.rollouts import Pending


@dataclass(slots=True)
class _Wave:
    """Rollouts that wait for the same ends of otlp_spans."""

    pendings: list[Pending]
    ends: dict[TopicPartition, int]


class Waits:
    """All that wait, in the order in which they began to."""

    def __init__(
        self, *, wait_seconds: float, settle_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.wait_seconds = wait_seconds
        self.in_use = False
        """Whether there is a translator: without one nobody begins to wait."""
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._away_seconds = 0.0
        self._fresh: list[Pending] = []
        self._waves: list[_Wave] = []

    def __len__(self) -> int:
        return len(self._fresh) + sum(len(wave.pendings) for wave in self._waves)

    def now(self) -> float:
        """A clock that stands still while Kafka is away: then nobody can have written or read anything."""
        return self._clock() - self._away_seconds

    def away(self, seconds: float) -> None:
        """So long Kafka gave no answer. Who began to wait meanwhile, with what was read as it came back, begins now."""
        self._away_seconds += seconds
        now = self.now()
        for pending in self._all():
            pending.since = min(pending.since, now)

    def begin(self, pending: Pending) -> None:
        pending.waits, pending.since = True, self.now()
        self._fresh.append(pending)

    def settled(self) -> list[Pending]:
        """Those for whom ends of otlp_spans count that are asked for from now on."""
        before = self.now() - self._settle_seconds
        return [pending for pending in self._fresh if pending.since <= before]

    def has_questions(self) -> bool:
        """Whether anything is to be asked of Kafka now."""
        before = self.now() - min(self._settle_seconds, self.wait_seconds)
        return bool(self._waves) or any(pending.since <= before for pending in self._fresh)

    def asked(self, settled: Sequence[Pending], ends: Mapping[TopicPartition, int]) -> None:
        """`ends` were asked for after `settled` had been."""
        if settled:
            gone = set(map(id, settled))
            self._fresh = [pending for pending in self._fresh if id(pending) not in gone]
            self._waves.append(_Wave(list(settled), dict(ends)))

    def translated(self, read_to: Mapping[TopicPartition, int]) -> int:
        """How many waves, the oldest ones, the translator has left behind it."""
        count = 0
        for wave in self._waves:
            wave.ends = {tp: end for tp, end in wave.ends.items() if read_to.get(tp, end) < end}
            if wave.ends:
                break
            count += 1
        return count

    def release(self, waves: int, barrier: Mapping[TopicPartition, int]) -> None:
        """These are complete as soon as `rewards` was read up to `barrier`, its ends asked for after translated()."""
        shared = dict(barrier)
        for wave in self._waves[:waves]:
            for pending in wave.pendings:
                pending.barrier, pending.waits = shared, False
        del self._waves[:waves]

    def give_up(self) -> list[Pending]:
        """Those that have waited for as long as they may: nothing keeps them any more."""
        before = self.now() - self.wait_seconds
        overdue = [pending for pending in self._all() if pending.since <= before]
        self._leave(overdue)
        return overdue

    def release_all(self) -> None:
        """There is nothing to wait for: no translator."""
        self._leave(self._all())

    def behind(self, read_to: Mapping[TopicPartition, int]) -> int:
        """How many offsets the translator has left for the newest ones that wait."""
        newest = self._waves[-1].ends if self._waves else {}
        return sum(max(0, end - read_to.get(tp, end)) for tp, end in newest.items())

    def _all(self) -> list[Pending]:
        return [*self._fresh, *(pending for wave in self._waves for pending in wave.pendings)]

    def _leave(self, leaving: Sequence[Pending]) -> None:
        if not leaving:
            return
        for pending in leaving:
            pending.barrier, pending.waits = {}, False
        self._fresh = [pending for pending in self._fresh if pending.waits]
        for wave in self._waves:
            wave.pendings = [pending for pending in wave.pendings if pending.waits]
        self._waves = [wave for wave in self._waves if wave.pendings]

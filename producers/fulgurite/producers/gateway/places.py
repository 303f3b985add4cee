"""Who may be asked now, and who waits for that: bounds on concurrency and on queues, per backend and in all.

A request takes a Seat at one of the backends that would do, and leaves it exactly once. Requests that would do with the
same backends wait in one line, first come first served; of several lines the one whose head has waited longest goes
first. Nobody waits while there is room for them: a line is looked at when a seat is left, when a backend's health or
version changes, and when a breaker lets the next one through. What a call needs once it is sampled passes lines and
bounds (`past_bounds`): it is small, and what was sampled would be lost. It holds a seat all the same, so nobody else
begins before it ends.

Which backend (`choose`): for a pinned request the first that takes it in the pin's own order of all backends
(rendezvous hashing: a backend that goes or comes moves only the pins that are its own; one that is full sends each of
its pins to that pin's second, always the same). For others the one with the fewest requests.

Knows no HTTP: a Capacity is what is known of a backend. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fulgurite.producers.gateway.breaker import Breaker
from fulgurite.producers.gateway.errors import ApiError


@dataclass(slots=True, eq=False)
class Capacity:
    """What is known of one backend."""

    url: str
    breaker: Breaker
    most: int = 0
    """Requests at once; 0: no bound."""
    most_waiting: int = 0
    """Requests that may wait for it; 0: no bound."""
    well: bool = True
    """What its health checks say."""
    behind: bool = False
    """Whether its weights lack a version, where what is asked of it was served with one (routing.py)."""
    in_flight: int = 0
    taken: int = 0
    """Requests it was ever given."""

    def works(self, now: float) -> bool:
        """Whether it may be asked what no version matters to, as far as its health goes."""
        return self.well and self.breaker.allows(now)

    def answers(self, now: float) -> bool:
        """Whether it may be asked, were there room."""
        return not self.behind and self.works(now)

    def takes(self, now: float) -> bool:
        """Whether it may be asked, and has room."""
        return (not self.most or self.in_flight < self.most) and self.answers(now)


class Seat:
    """A request's place at a backend."""

    __slots__ = ("_over", "_places", "_worked", "capacity", "era")

    def __init__(self, places: Places, capacity: Capacity, era: int) -> None:
        self._places: Places | None = places
        self._over = self._worked = False
        self.capacity = capacity
        self.era = era
        """Of the backend's breaker, when the request began."""

    @property
    def answered(self) -> bool:
        """Whether the request had an answer, or some of one that did not fail."""
        return self._worked and not self._over

    def works(self) -> None:
        """The request is being answered."""
        self._worked = True
        if self.capacity.breaker.works() and self._places:
            self._places.changed()

    def succeeded(self) -> None:
        """All of the answer came. Of no effect after a failure."""
        if not self._over:
            self._worked = True
            if self.capacity.breaker.succeeded() and self._places:
                self._places.changed()

    def failed(self, now: float) -> None:
        """The backend gave no answer, or not all of one; counted once."""
        if not self._over:
            self._over = True
            if self.capacity.breaker.failed(now, self.era) and self._places:
                self._places.changed()  # sets the alarm for the next probe

    def excused(self) -> None:
        """The backend gave no answer, and that says nothing of it, as far as is known: see `Places.failed`."""
        self._over = True

    def leave(self) -> None:
        """Frees the place; a second time does nothing."""
        if self._places is not None:
            places, self._places = self._places, None
            places.left(self.capacity)


@dataclass(slots=True)
class _Waiter:
    pin: str
    number: int
    """In order of arrival."""


class Admission:
    """A block in which a request is admitted."""

    __slots__ = ("_candidates", "_places")

    def __init__(self, places: Places, candidates: tuple[Capacity, ...]) -> None:
        self._places = places
        self._candidates = candidates

    def __enter__(self) -> None:
        self._places.admit(self._candidates)

    def __exit__(self, *_: object) -> None:
        self._places.dismiss()


class QueueTimeout(Exception):
    """No seat in time. `busy`: a backend was there, but full."""

    def __init__(self, *, busy: bool) -> None:
        super().__init__()
        self.busy = busy


def score(pin: str, url: str) -> int:
    """How much the pin prefers the backend."""
    return int.from_bytes(blake2b(f"{pin}\n{url}".encode("utf-8", "replace"), digest_size=8).digest())


def choose(candidates: Sequence[Capacity], pin: str, now: float, *, past_bounds: bool = False) -> Capacity | None:
    """The one to ask, None when none takes a request now."""
    free = [capacity for capacity in candidates if (capacity.works if past_bounds else capacity.takes)(now)]
    if len(free) < 2:
        return free[0] if free else None
    if pin:
        return max(free, key=lambda capacity: score(pin, capacity.url))
    return min(free, key=lambda capacity: (capacity.in_flight, capacity.taken))


class Places:
    """All seats of a pool. To be used within one event loop."""

    def __init__(self, most: int, most_waiting: int) -> None:
        self._most = most
        self._most_waiting = most_waiting
        self._lines: dict[tuple[Capacity, ...], dict[asyncio.Future[Seat], _Waiter]] = {}
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None
        self._arrivals = 0
        self._admitted = 0
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests that hold no seat: in line, or in the pause before they try again."""
        return self._admitted - self.in_flight

    def close(self) -> None:
        if self._alarm:
            self._alarm.cancel()

    def admitted(self, candidates: tuple[Capacity, ...]) -> Admission:
        """A request is ours within the block. Raises ApiError(429) when it would have to wait, and too many do."""
        return Admission(self, candidates)

    def admit(self, candidates: tuple[Capacity, ...], *, past_bounds: bool = False) -> None:
        """What `admitted` does at its beginning."""
        if not past_bounds and not self._has_room(candidates):
            if self.waiting >= self._most_waiting:
                message = f"{self.waiting} requests wait already (gateway.max_queued_requests)"
                raise ApiError(429, "too_many_requests", message)
            bound = _line_bound(candidates)
            if bound is not None and len(self._lines.get(candidates, ())) >= bound:
                message = f"{bound} requests wait for this model already (max_queued_requests of its backends)"
                raise ApiError(429, "too_many_requests", message)
        self._admitted += 1

    def dismiss(self) -> None:
        """The end of a request that was admitted."""
        self._admitted -= 1

    def take_now(self, candidates: Sequence[Capacity], pin: str, *, past_bounds: bool = False) -> Seat | None:
        """A seat, where there is one without waiting. Passes whoever stands in line: for those who stood there once."""
        if self.in_flight >= self._most and not past_bounds:
            return None
        now = self._loop.time()
        capacity = choose(candidates, pin, now, past_bounds=past_bounds)
        return self._seated(capacity, now) if capacity else None

    async def take(self, candidates: tuple[Capacity, ...], pin: str, busy_until: float, until: float) -> Seat:
        """A seat. Raises QueueTimeout: at `busy_until` when a backend is there but full, else at `until`."""
        if candidates not in self._lines and (seat := self.take_now(candidates, pin)):
            return seat
        # An await that is timed out or cancelled just when the seat was given: it is left again.
        granted: asyncio.Future[Seat] = self._loop.create_future()
        self._arrivals += 1
        line = self._lines.setdefault(candidates, {})
        line[granted] = _Waiter(pin, self._arrivals)
        self._set_alarm()
        try:
            for limit in (min(busy_until, until), until):
                await asyncio.wait([granted], timeout=limit - self._loop.time())
                if granted.done():
                    break
                if self._busy(candidates):
                    raise QueueTimeout(busy=True)
        except BaseException:
            if granted.done():
                granted.result().leave()
            raise
        finally:
            line.pop(granted, None)
            # A later line for the same backends is another dict.
            if not line and self._lines.get(candidates) is line:
                del self._lines[candidates]
        if not granted.done():
            raise QueueTimeout(busy=False)
        return granted.result()

    def left(self, capacity: Capacity) -> None:
        """A seat was left."""
        capacity.in_flight -= 1
        self.in_flight -= 1
        self.changed()

    def failed(self, capacity: Capacity, era: int) -> None:
        """It turned out that a request of that era, which was excused, had failed for the backend's sake."""
        if capacity.breaker.failed(self._loop.time(), era):
            self.changed()

    def changed(self) -> None:
        """Something may let somebody in: seats are given to whoever can have one."""
        now = self._loop.time()
        while self._lines and self.in_flight < self._most and self._seat_first(now):
            pass
        self._set_alarm()

    def _seat_first(self, now: float) -> bool:
        """Gives a seat to the one who has waited longest of those who can have one."""
        lines = self._lines
        heads = (
            sorted((next(iter(line.values())).number, key) for key, line in lines.items()) if len(lines) > 1 else None
        )
        for candidates in [key for _, key in heads] if heads else list(lines):
            granted, waiter = next(iter(lines[candidates].items()))
            if capacity := choose(candidates, waiter.pin, now):
                granted.set_result(self._seated(capacity, now))
                del lines[candidates][granted]
                if not lines[candidates]:
                    del lines[candidates]
                return True
        return False

    def _seated(self, capacity: Capacity, now: float) -> Seat:
        capacity.in_flight += 1
        capacity.taken += 1
        self.in_flight += 1
        return Seat(self, capacity, capacity.breaker.entered(now))

    def _has_room(self, candidates: tuple[Capacity, ...]) -> bool:
        """Whether a request that comes now goes straight through."""
        if self.in_flight >= self._most or candidates in self._lines:
            return False
        now = self._loop.time()
        return any(capacity.takes(now) for capacity in candidates)

    def _busy(self, candidates: tuple[Capacity, ...]) -> bool:
        now = self._loop.time()
        return any(capacity.answers(now) for capacity in candidates)

    def _set_alarm(self) -> None:
        """For the next breaker that lets somebody of a line through."""
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        now = self._loop.time()
        times = [
            at
            for candidates in self._lines
            for capacity in candidates
            if (at := capacity.breaker.allows_at()) is not None and at > now
        ]
        if times:
            self._alarm = self._loop.call_at(min(times), self.changed)


def _line_bound(candidates: Sequence[Capacity]) -> int | None:
    bounds = [capacity.most_waiting for capacity in candidates]
    return sum(bounds) if all(bounds) else None

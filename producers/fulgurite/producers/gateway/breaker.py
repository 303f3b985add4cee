"""A circuit breaker: a backend that fails again and again is left alone for a while, then asked once to see.

    closed ── failures in a row ──► open ── the pause is over ──► half-open ── a whole answer ──► closed
                                     ▲                                │
                                     └── the probe failed: twice the pause, up to a bound ─┘

Half-open lets one request through a pause: a probe that neither succeeds nor fails (a long generation, an agent that
hung up) keeps nobody waiting for longer than that, and none can be lost. Failures of requests that began before it
opened count for nothing, they are old news; an answer to one of them closes it, since a server that answers is there.
Failures are in a row as long as no answer came to its end between them: one that has only begun may yet break. It lets
the others in again, but the next failure opens it anew.

Pure: the time is passed in, of any clock that never goes back.
"""

from __future__ import annotations

from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """Of one backend."""

    def __init__(self, failures: int, first_seconds: float, most_seconds: float) -> None:
        self._bound = failures
        self._first_seconds = first_seconds
        self._most_seconds = max(first_seconds, most_seconds)
        self._failures = 0
        self._pause_seconds = first_seconds
        self._next_at: float | None = None
        self._era = 0

    def state(self, now: float) -> BreakerState:
        if self._next_at is None:
            return "closed"
        return "open" if now < self._next_at else "half-open"

    def allows(self, now: float) -> bool:
        """Whether a request may begin."""
        return self._next_at is None or now >= self._next_at

    def allows_at(self) -> float | None:
        """When it next lets a request through, None when it always does."""
        return self._next_at

    def entered(self, now: float) -> int:
        """A request begins, which `allows` permitted. Gives the era to say when it fails."""
        if self._next_at is not None:
            self._next_at = now + self._pause_seconds
        return self._era

    def succeeded(self) -> bool:
        """A request was answered, or the backend was seen to be back. Whether that closed it."""
        closed = self._next_at is not None
        self._failures = 0
        self._next_at = None
        self._pause_seconds = self._first_seconds
        return closed

    def works(self) -> bool:
        """A request is being answered. Whether that closed it, until the next failure."""
        closed = self._next_at is not None
        if closed:
            self._failures = self._bound - 1
            self._next_at = None
        return closed

    def failed(self, now: float, era: int) -> bool:
        """A request of that era failed. Whether it opened the breaker, or kept it open."""
        if era != self._era:
            return False
        if self._next_at is None:
            self._failures += 1
            if self._failures < self._bound:
                return False
        else:
            self._pause_seconds = min(self._pause_seconds * 2, self._most_seconds)
        self._era += 1
        self._next_at = now + self._pause_seconds
        return True

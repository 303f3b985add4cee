"""How often one server failed versions, in a row: at the load, or by its end soon after it.

A server that is started anew shows nothing of what ended it, so two things are counted, each by itself: loads that
failed, until one succeeds, and ends within `outlive_seconds` after a load that had, until the server outlives one. So
one restart by a person speaks against no version, whatever failed before it. Bounded by the versions that failed.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

from fulgurite.consumers.follower.versions import Identity

LOAD_TRIES: Final = 3
"""A version whose load fails this often, also by the server's end, is refused; so is one that it outlives as seldom."""


class Tries:
    def __init__(self, outlive_seconds: float) -> None:
        self._outlive_seconds = outlive_seconds
        self._failures: Counter[Identity] = Counter()
        self._ends: Counter[Identity] = Counter()
        self._loaded: Identity | None = None
        """What it has to outlive."""
        self._loaded_at = 0.0
        self._away_at: float | None = None
        """Since when it has not answered."""

    def failed(self, key: Identity, *, counts: bool) -> bool:
        """A load failed. Whether that was once too often."""
        self._loaded = None
        self._failures[key] += counts
        return self._failures[key] >= LOAD_TRIES

    def loaded(self, key: Identity) -> None:
        self._failures.pop(key, None)
        self._loaded, self._loaded_at, self._away_at = key, time.monotonic(), None

    def away(self) -> None:
        """It does not answer."""
        if self._away_at is None:
            self._away_at = time.monotonic()

    def observed(self, wanted: Identity | None, *, served: bool, restarted: bool) -> None:
        """It answers. `restarted`: as far as its label says, that is nobody's."""
        now = time.monotonic()
        if wanted is None or wanted != self._loaded:
            self._loaded = None
        elif served:
            if now - self._loaded_at >= self._outlive_seconds:
                self._loaded = None
                self._ends.pop(wanted, None)
        elif restarted:
            ended_at = now if self._away_at is None else self._away_at
            self._loaded = None
            if ended_at - self._loaded_at < self._outlive_seconds:
                self._ends[wanted] += 1
            else:
                self._ends.pop(wanted, None)
        self._away_at = None

    def is_deadly(self, key: Identity) -> bool:
        """Whether the server ended too often after loading it."""
        return self._ends[key] >= LOAD_TRIES

    def forget(self, key: Identity) -> None:
        self._failures.pop(key, None)
        self._ends.pop(key, None)

"""Waiting between tries, visibly: delays that double up to a bound, and a log line at most once per few seconds.

For faults that pass (a broker or a service is away). Does not know what is tried; never gives up: its caller may.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

FIRST_SECONDS = 0.05
"""The first delay: a restart of a local service takes about a second, so a few tries fall into it."""

MOST_SECONDS = 5.0
"""The longest delay: short enough that nobody waits long for a service that is back."""

LOG_SECONDS = 5.0
"""At most one line per this, however often it is tried."""


class Backoff:
    """One sequence of tries at one thing. `reset` after a success."""

    def __init__(self, logger: logging.Logger, first_seconds: float = FIRST_SECONDS) -> None:
        self._logger = logger
        self._first_seconds = first_seconds
        self._delay = first_seconds
        self._logged = 0.0

    async def wait(self, problem: str) -> None:
        """Logs `problem` if it is time to, then sleeps; the delay is jittered so that many clients do not march."""
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._logger.warning("%s; trying again", problem)
        await asyncio.sleep(self._delay * random.uniform(0.75, 1.0))
        self._delay = min(self._delay * 2, MOST_SECONDS)

    def reset(self) -> None:
        """The next failure starts with short delays again."""
        self._delay = self._first_seconds

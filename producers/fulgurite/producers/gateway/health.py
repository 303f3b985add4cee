"""What /health says: whether the broker can be reached, and a backend asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

HEALTH_SECONDS: Final = 2.0
"""Longest that one side of a health check may take."""
HEALTH_SHARED_SECONDS: Final = 1.0
"""For how long one check answers everybody: anybody may ask, and each costs a connection to the broker."""

Check = Callable[[], Awaitable[str]]
"""A health check: empty when well, else what is wrong."""


class Health:
    """One gateway's."""

    def __init__(self, broker: Check, backends: Callable[[float], Awaitable[str]]) -> None:
        """`backends` is told how many seconds it may take."""
        self._broker = broker
        self._backends = backends
        self._asked: asyncio.Task[dict[str, str]] | None = None
        self._until = float("-inf")

    async def report(self) -> dict[str, str]:
        """Of each side `ok`, or what is wrong; `status` is `ok` where both are."""
        now = asyncio.get_running_loop().time()
        if self._asked is None or (self._asked.done() and now >= self._until):
            self._until = now + HEALTH_SHARED_SECONDS
            self._asked = asyncio.create_task(self._ask())
        # Shielded: others wait for the same one.
        return await asyncio.shield(self._asked)

    async def _ask(self) -> dict[str, str]:
        broker, backend = await asyncio.gather(self._broker(), self._backends(HEALTH_SECONDS))
        return {
            "status": "unhealthy" if broker or backend else "ok",
            "broker": broker or "ok",
            "backend": backend or "ok",
        }

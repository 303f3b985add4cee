"""Who waits for the end of which rollouts. A wait costs one set entry an id; an end costs its own waiters, no scan."""

from __future__ import annotations

import asyncio

from fulgurite.consumers.coordinator.refused import Refused

MAX_END_WAITS = 100_000
"""Rollouts whose end is waited for at once; more are refused with 503."""


class _Wait:
    def __init__(self, left: set[str]) -> None:
        self.left = left
        self.over = asyncio.Event()


class EndWaits:
    def __init__(self) -> None:
        self._waits: dict[str, set[_Wait]] = {}

    def ended(self, rollout_id: str) -> None:
        for wait in self._waits.pop(rollout_id, ()):
            wait.left.discard(rollout_id)
            if not wait.left:
                wait.over.set()

    def let_go(self) -> None:
        """Ends every wait now."""
        for waits in self._waits.values():
            for wait in waits:
                wait.over.set()

    async def wait(self, rollout_ids: set[str], timeout_seconds: float) -> None:
        """Returns when all have ended, or time is up."""
        if not rollout_ids:
            return
        if len(self._waits) + len(rollout_ids) > MAX_END_WAITS:
            raise Refused(503, f"{len(self._waits)} rollouts are waited for already; the bound is {MAX_END_WAITS}")
        wait = _Wait(rollout_ids)
        for rollout_id in rollout_ids:
            self._waits.setdefault(rollout_id, set()).add(wait)
        try:
            async with asyncio.timeout(timeout_seconds):
                await wait.over.wait()
        except TimeoutError:
            return
        finally:
            for rollout_id in wait.left:
                waits = self._waits[rollout_id]
                waits.discard(wait)
                if not waits:
                    del self._waits[rollout_id]

"""Who may pause its server: one at a time (rolling), or everybody at once (together).

Promises: a server that stops answering while it is paused keeps nobody else waiting for longer than the call that
finds that out; whoever holds the turn gives it back early then (`Turn.give_back`).
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Literal

RolloutPolicy = Literal["rolling", "together"]


class Turns:
    def __init__(self, policy: RolloutPolicy) -> None:
        self._lock = asyncio.Lock() if policy == "rolling" else None

    def turn(self) -> Turn:
        return Turn(self._lock)


class Turn:
    """Entered when it is this server's turn; over at the latest when it is left."""

    def __init__(self, lock: asyncio.Lock | None) -> None:
        self._lock = lock
        self._held = False

    async def __aenter__(self) -> Turn:
        if self._lock is not None:
            await self._lock.acquire()
            self._held = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        if self._lock is not None and self._held:
            self._held = False
            self._lock.release()

"""How long one try of a backend is waited for (pool.py)."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from fulgurite.producers.gateway.exchange import Ask
from fulgurite.producers.gateway.replica import Replica

LOOK_SECONDS: Final = 0.5
"""How often it is looked whether a backend is well that takes longer than a first byte may."""


class Patience:
    """The block of one try: ends it with TimeoutError at the ask's deadline, or, where the answer comes whole, as soon
    after it as the backend is not well, at the latest at the deadline for whole answers."""

    __slots__ = ("_ask", "_loop", "_replica", "_timer", "_watch")

    def __init__(self, replica: Replica, ask: Ask, loop: asyncio.AbstractEventLoop) -> None:
        self._replica = replica
        self._ask = ask
        self._loop = loop
        self._timer = asyncio.timeout_at(max(ask.deadline, ask.whole_deadline))
        self._watch: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._timer.__aenter__()
        if self._ask.whole_deadline > self._ask.deadline:
            self._watch = self._loop.call_at(self._ask.deadline, self._look)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._watch:
            self._watch.cancel()
        return await self._timer.__aexit__(kind, error, trace)

    def _look(self) -> None:
        if self._replica.well:
            self._watch = self._loop.call_later(LOOK_SECONDS, self._look)
        else:
            self._timer.reschedule(self._loop.time())

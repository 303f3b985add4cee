"""What servers got, on its way to `training`: published one after the other, for ever, while convergence goes on.

A broker that is away must not keep a server without weights. Promises: every report is published at least once while
this process lives; of the same server and version only the newest counts. Bounded: beyond MAX_WAITING the oldest is
given up, loudly. What a crash takes along, the next start reports again: it loads the newest version once more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Final

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.errors import BufferFull, Undelivered
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import VersionApplied

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 1_000
"""Reports: hours of them."""

_Key = tuple[str, int, bool]


class Reports:
    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._waiting: OrderedDict[_Key, VersionApplied] = OrderedDict()
        self._some = asyncio.Event()

    async def add(self, event: VersionApplied) -> None:
        """Takes the event; `run` publishes it."""
        key = (event.server, event.version, event.ok)
        self._waiting.pop(key, None)
        self._waiting[key] = event
        if len(self._waiting) > MAX_WAITING:
            _, lost = self._waiting.popitem(last=False)
            logger.error("the report of version %d on %s is given up: %d wait", lost.version, lost.server, MAX_WAITING)
        self._some.set()

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(logger)
        while True:
            if not self._waiting:
                self._some.clear()
                await self._some.wait()
            key, event = next(iter(self._waiting.items()))
            try:
                await (await self._publisher.publish(TRAINING, event.run_id, event))
            except (BufferFull, Undelivered) as error:
                await backoff.wait(f"cannot report version {event.version}: {error}")
                continue
            backoff = Backoff(logger)
            if self._waiting.get(key) is event:
                del self._waiting[key]

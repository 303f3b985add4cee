"""How often the assembler looks who of all that wait is ready. Without Kafka."""

from __future__ import annotations

import asyncio
import time

from fulgurite.schemas.settings import Settings
from fulgurite.streams.assembler.assembly import Assembly
from fulgurite.streams.assembler.inputs import Inputs
from fulgurite.streams.assembler.rollouts import Pending
from fulgurite.streams.assembler.service import Assembler
from fulgurite.streams.transactions import Transactions, no_hook


class Slow(Assembly):
    """A look at all that wait takes ten milliseconds, and nobody is ever ready."""

    looks = 0

    def ready(self, limit: int) -> list[Pending]:
        self.looks += 1
        time.sleep(0.01)
        return []


async def test_looking_at_all_that_wait_leaves_time_for_everything_else() -> None:
    settings = Settings()
    state = Slow([], [], [], max_open_rollouts=1, orphan_seconds=1.0)
    transactions = Transactions(settings.kafka, "id", "group")
    assembler = Assembler(settings, Inputs(settings.kafka), transactions, state, no_hook)
    stop = asyncio.Event()
    committing = asyncio.create_task(assembler.commit_batches(stop))
    end = time.monotonic() + 0.8
    while time.monotonic() < end:
        assembler._changed.set()  # pyright: ignore[reportPrivateUsage]  # every fetch does
        await asyncio.sleep(0.001)
    stop.set()
    await committing
    assert 1 <= state.looks <= 20

"""One request's generations on their way from the engine to whoever answers: what whole steps made, in order.

The engine appends to a Generation from its own thread while a step runs, so a Generation that is not finished is read
between two steps only. `publish` is called there; readers see its copies. Knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from fulgurite.streams.policy_server.engine import FinishReason, Generation


@dataclass(slots=True, frozen=True)
class Delta:
    """What one step added to one generation; the last one of each has its finish reason."""

    index: int
    """Of the generation within its request."""
    start: int
    """Of `tokens` within the generation."""
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | None


class Underway:
    def __init__(self, generations: Sequence[Generation], streamed: bool) -> None:
        self.generations = generations
        self._streamed = streamed
        self._index_of = {generation: index for index, generation in enumerate(generations)}
        self._read = [0] * len(generations)
        self._unfinished = len(generations)
        self._finished = asyncio.Event()
        # Bounded by max_new_tokens for each generation: a client that reads slowly holds up nobody else.
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()

    def publish(self, generation: Generation) -> None:
        """Called between two steps, after each that touched it."""
        if self._streamed:
            self._deltas.put_nowait(self._delta(generation))
        if generation.finish_reason is not None:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._finished.set()

    def _delta(self, generation: Generation) -> Delta:
        index = self._index_of[generation]
        start, self._read[index] = self._read[index], len(generation.tokens)
        finished = generation.finish_reason is not None
        return Delta(
            index=index,
            start=start,
            tokens=generation.tokens[start:],
            logprobs=generation.logprobs[start:],
            text=generation.text.take(finished) if generation.text is not None else "",
            finish_reason=generation.finish_reason,
            stop_reason=generation.stop_reason,
        )

    async def finished(self) -> None:
        """When every generation has."""
        await self._finished.wait()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Until every generation has finished. Once."""
        unfinished = len(self.generations)
        while unfinished:
            delta = await self._deltas.get()
            unfinished -= delta.finish_reason is not None
            yield delta

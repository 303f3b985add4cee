"""Calls of a user's functions; of a plain one each in a daemon thread of its own, which ends with its call or hangs
alone.

Promises: what hangs keeps neither the event loop nor another call nor the process's end waiting; whatever is raised
comes out at once as an Exception. Bounds: the caller's for calls at once; `check` ends the process where MAX_HUNG that
nobody waits for go on. Does not know what is called, nor how long it may take.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fulgurite.producers.agents import AgentCalls
from fulgurite.schemas.errors import FulguriteError

MAX_HUNG = 256
"""Calls past their time limit that still go on: a thread cannot be ended, and each keeps its memory."""


class TooManyHung(FulguriteError):
    """A user's function hangs again and again: the process ends, which ends the threads."""


class PlainCalls:
    """Those of one process."""

    def __init__(self, max_hung: int = MAX_HUNG) -> None:
        self._max_hung = max_hung
        self._calls = AgentCalls()

    def check(self) -> None:
        """Raises TooManyHung. Ask before the first try of an input: what was begun is brought to its end."""
        if (hung := self._calls.hung) >= self._max_hung:
            raise TooManyHung(
                f"{hung} calls of functions hang after their time limit and cannot be stopped (bound: "
                f"{self._max_hung}); the process ends, and its restart begins with the next input. Give the function "
                "timeouts of its own, or make it a coroutine"
            )

    async def run(self, call: Callable[[], Any], name: str) -> Any:
        """What `call` returns or raises. When cancelled, the thread goes on, unheard."""
        return await self._calls.run_in_thread(lambda: sane(call, name))


async def awaited(given: Awaitable[Any], name: str) -> Any:
    """What a coroutine of the user's gives or raises. SystemExit, which would end the event loop, becomes a
    RuntimeError."""
    try:
        return await given
    except SystemExit as error:
        raise RuntimeError(f"{name} raised SystemExit: {error}") from error


def sane(call: Callable[[], Any], name: str) -> Any:
    """Calls it. What must not travel through a future or an event loop (StopIteration, SystemExit, a cancellation that
    nobody asked for) becomes a RuntimeError."""
    try:
        return call()
    except StopIteration as error:
        raise RuntimeError(f"{name} raised StopIteration: next() found nothing; give it a default") from error
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{name} raised {type(error).__name__}: {error}") from error

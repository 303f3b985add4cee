"""A bound on how long a coroutine may take that costs nothing where it does not wait.

`asyncio.timeout` sets and cancels a timer each time. What mostly finishes at once, since there is room in a buffer or a
body has come, is run to its first wait here, and only then gets a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Its result. Raises TimeoutError when it still waits after so long; it is cancelled then."""
    try:
        first = work.send(None)
    except StopIteration as done:
        return done.value
    async with asyncio.timeout(seconds):
        return await _Rest(work, first)


class _Rest(Generic[T]):
    """A coroutine from its first wait on; what is waited for there was yielded already."""

    def __init__(self, work: Coroutine[Any, Any, T], first: Any) -> None:
        self._work = work
        self._first = first

    def __await__(self) -> Generator[Any, Any, T]:
        waiting = self._first
        while True:
            try:
                try:
                    value = yield waiting
                except GeneratorExit:
                    self._work.close()
                    raise
                except BaseException as error:
                    waiting = self._work.throw(error)
                else:
                    waiting = self._work.send(value)
            except StopIteration as done:
                return done.value

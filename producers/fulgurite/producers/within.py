"""Bounds on waiting that cost little: on a coroutine that mostly does not wait, and on futures that nobody may cancel.

`asyncio.timeout` sets and cancels a timer each time. What mostly finishes at once, since there is room in a buffer or a
body has come, is run to its first wait here, and only then gets a timer. `asyncio.wait` copies what it is given into
sets and looks at each whether it is a coroutine; futures are just waited for here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Sequence
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


async def settled(futures: Sequence[asyncio.Future[Any]], seconds: float) -> bool:
    """Whether all are done, at the latest after so long. However it ends, none of them is cancelled."""
    left = [future for future in futures if not future.done()]
    if not left:
        return True
    loop = left[0].get_loop()
    all_done: asyncio.Future[bool] = loop.create_future()
    open_ones = len(left)

    def tell(result: bool) -> None:
        if not all_done.done():
            all_done.set_result(result)

    def one_is_done(_: asyncio.Future[Any]) -> None:
        nonlocal open_ones
        open_ones -= 1
        if not open_ones:
            tell(True)

    timer = loop.call_later(seconds, tell, False)
    for future in left:
        future.add_done_callback(one_is_done)
    try:
        return await all_done
    finally:
        timer.cancel()
        for future in left:
            future.remove_done_callback(one_is_done)


async def in_its_own_task(work: Coroutine[Any, Any, T]) -> T:
    """What a task that was cancelled has left to do. In that task `asyncio.timeout` would raise CancelledError in place
    of TimeoutError: so in Python 3.11.2, which is Debian 12's."""
    return await asyncio.create_task(work)


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

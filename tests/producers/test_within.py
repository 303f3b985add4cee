"""A bound on time that costs nothing where nothing is waited for."""

from __future__ import annotations

import asyncio

import pytest

from fulgurite.producers.within import in_its_own_task, settled, within


async def at_once(value: int) -> int:
    if value < 0:
        raise ValueError(value)
    return value


async def after_waits(value: int, log: list[str]) -> int:
    try:
        for _ in range(3):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        return await at_once(value)
    except BaseException as error:
        log.append(type(error).__name__)
        raise
    finally:
        await asyncio.sleep(0)
        log.append("end")


async def test_what_does_not_wait_needs_no_timer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asyncio, "timeout", None)
    assert await within(0.0, at_once(5)) == 5
    with pytest.raises(ValueError, match="-1"):
        await within(1.0, at_once(-1))


async def test_what_waits_gives_its_result_or_its_error():
    log: list[str] = []
    assert await within(5.0, after_waits(5, log)) == 5
    with pytest.raises(ValueError, match="-1"):
        await within(5.0, after_waits(-1, log))
    assert log == ["end", "ValueError", "end"]


async def test_what_waits_too_long_is_cancelled():
    log: list[str] = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            log.append("end")

    with pytest.raises(TimeoutError):
        await within(0.01, for_ever())
    assert log == ["end"]


async def test_a_cancellation_from_outside_passes_through():
    log: list[str] = []
    task = asyncio.create_task(within(5.0, after_waits(1, log)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["CancelledError", "end"]


async def test_an_error_within_the_wait_reaches_the_work():
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def waits() -> int:
        try:
            return await future
        except KeyError:
            return 7

    running = asyncio.create_task(within(5.0, waits()))
    await asyncio.sleep(0)
    future.set_exception(KeyError())
    assert await running == 7


async def test_futures_are_waited_for_and_left_alone():
    loop = asyncio.get_running_loop()
    quick, slow = loop.create_future(), loop.create_future()
    assert await settled([], 0.0)
    assert not await settled([quick, slow], 0.001)
    loop.call_later(0.001, quick.set_result, 1)
    loop.call_later(0.002, slow.set_exception, ValueError("no"))
    assert await settled([quick, slow, quick], 5.0)
    assert (quick.result(), str(slow.exception())) == (1, "no")
    assert await settled([quick, slow], 0.0)


async def test_who_stops_waiting_for_futures_leaves_nothing_behind():
    future = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(settled([future], 60.0))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not future.done()
    future.set_result(None)


async def test_what_a_cancelled_task_has_left_to_do_is_bounded_in_time():
    """In the task itself some Pythons' timeouts end as another cancellation."""
    ended: list[str] = []

    async def left() -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            ended.append("in time")

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await in_its_own_task(left())
            raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["in time"]

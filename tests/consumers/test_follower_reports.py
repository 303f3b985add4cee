"""Reports wait for the broker; nobody waits for reports."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from fulgurite.consumers.follower import reports as reports_module
from fulgurite.consumers.follower.reports import Reports
from fulgurite.schemas.errors import Undelivered
from fulgurite.schemas.training import VersionApplied
from tests.producers.fake_policy_server import until


class Broker:
    """Away until it is there."""

    def __init__(self) -> None:
        self.away = True
        self.events: list[VersionApplied] = []

    async def publish(self, topic: Any, key: str, event: VersionApplied) -> asyncio.Future[None]:
        if self.away:
            raise Undelivered(1, None)
        self.events.append(event)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def applied(version: int, *, ok: bool = True, error: str = "") -> VersionApplied:
    return VersionApplied(
        run_id="run", resource="policy", version=version, server="http://a", ok=ok, error=error, seconds={}
    )


async def test_what_waits_is_published_when_the_broker_is_there_the_newest_of_a_kind() -> None:
    broker = Broker()
    reports = Reports(broker)  # pyright: ignore[reportArgumentType]
    running = asyncio.create_task(reports.run())
    for event in (applied(1), applied(2, ok=False, error="first"), applied(2, ok=False, error="second")):
        await asyncio.wait_for(reports.add(event), 1)
    assert broker.events == []
    broker.away = False
    await until(lambda: len(broker.events) == 2)
    assert [(event.version, event.error) for event in broker.events] == [(1, ""), (2, "second")]
    await reports.add(applied(3))
    await until(lambda: len(broker.events) == 3)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(reports_module, "MAX_WAITING", 2)
    broker = Broker()
    reports = Reports(broker)  # pyright: ignore[reportArgumentType]
    for version in (1, 2, 3):
        await reports.add(applied(version))
    assert "version 1 on http://a is given up" in caplog.text
    broker.away = False
    running = asyncio.create_task(reports.run())
    await until(lambda: len(broker.events) == 2)
    assert [event.version for event in broker.events] == [2, 3]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running

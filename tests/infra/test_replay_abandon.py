"""`fulgurite replay --abandon` beside a rebuild that is alive: every row is there once, whoever was faster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from fulgurite.consumers.materialiser.blocks import Partition
from fulgurite.consumers.materialiser.errors import Unavailable
from fulgurite.infra.replay import command
from fulgurite.infra.replay.run import Watch
from fulgurite.infra.replay.store import Range, ReplayStore
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.settings import Settings
from tests.infra.dlq_world import World
from tests.infra.test_replay import RECONCILED, fill

SECONDS = 30
REBUILD = command.Options("spans", from_offset=0, rebuild=True)
ABANDON = command.Options("spans")


@pytest.fixture
async def world(settings: Settings, tmp_path: Path) -> AsyncIterator[World]:
    found = World(settings, tmp_path)
    async with found.materialiser():
        await fill(found)
    yield found
    assert found.ask(RECONCILED) == [(80, 40, 0, 0)]
    assert found.ask("SELECT uniqExact(span_id) FROM spans") == [(80,)]


class Rebuild(threading.Thread):
    """A rebuild beside the test; ends with what it said."""

    def __init__(self, world: World, checkpoint: Callable[[str], None] = lambda step: None) -> None:
        super().__init__(daemon=True)
        self._world, self._checkpoint = world, checkpoint
        self.said = "nothing"

    def run(self) -> None:
        try:
            command.replay(self._world.settings, REBUILD, as_json=True, watch=Watch(checkpoint=self._checkpoint))
        except FulguriteError as error:
            self.said = str(error)


async def test_what_becomes_whole_before_it_is_ended_is_not_taken_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rebuild has deleted the old rows of one table of two when it is ended."""
    half, ended = threading.Event(), threading.Event()
    claim, send = ReplayStore.claim, ReplayStore._command  # pyright: ignore[reportPrivateUsage]

    async def late(store: ReplayStore, partitions: Sequence[Partition]) -> None:
        if threading.current_thread() is not rebuild:
            assert await asyncio.to_thread(half.wait, SECONDS)
        await claim(store, partitions)

    async def slow(store: ReplayStore, statement: str, parameters: dict[str, object]) -> None:
        await send(store, statement, parameters)
        if threading.current_thread() is rebuild and statement.startswith("DELETE FROM spans") and not half.is_set():
            half.set()
            assert await asyncio.to_thread(ended.wait, SECONDS)

    monkeypatch.setattr(ReplayStore, "claim", late)
    monkeypatch.setattr(ReplayStore, "_command", slow)
    inserted = threading.Event()
    let_go = threading.Event()

    def checkpoint(step: str) -> None:
        if step == "inserted" and not inserted.is_set():
            inserted.set()
            assert let_go.wait(SECONDS)

    rebuild = Rebuild(world, checkpoint)
    rebuild.start()
    assert await asyncio.to_thread(inserted.wait, SECONDS)
    abandoning = asyncio.create_task(asyncio.to_thread(command.abandon, world.settings, ABANDON))
    await asyncio.sleep(0.5)  # it knows what is unfinished, and comes to its claim
    let_go.set()
    assert await abandoning == 0
    ended.set()
    await asyncio.to_thread(rebuild.join, SECONDS)
    assert "another `fulgurite replay`" in rebuild.said


async def test_what_is_not_whole_when_it_is_ended_never_becomes_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    inserted, claimed = threading.Event(), threading.Event()

    def checkpoint(step: str) -> None:
        if step == "inserted":
            inserted.set()
            assert claimed.wait(SECONDS)

    rebuild = Rebuild(world, checkpoint)
    rebuild.start()
    assert await asyncio.to_thread(inserted.wait, SECONDS)
    claim = ReplayStore.claim

    async def then_the_other(store: ReplayStore, partitions: Sequence[Partition]) -> None:
        await claim(store, partitions)
        claimed.set()
        await asyncio.to_thread(rebuild.join, SECONDS)

    monkeypatch.setattr(ReplayStore, "claim", then_the_other)
    assert await asyncio.to_thread(command.abandon, world.settings, ABANDON) == 0
    assert "another `fulgurite replay`" in rebuild.said
    assert world.ask("SELECT count() FROM replay_log WHERE state = 'whole'") == [(0,)]


def _dies(step: str) -> Callable[[str], None]:
    def checkpoint(done: str) -> None:
        if done == step:
            raise FulguriteError("dies here")

    return checkpoint


async def _dead(world: World, step: str) -> None:
    rebuild = Rebuild(world, _dies(step))
    rebuild.start()
    await asyncio.to_thread(rebuild.join, SECONDS)
    assert rebuild.said == "dies here"


async def test_what_is_being_ended_goes_no_further(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await _dead(world, "inserted")
    with monkeypatch.context() as patched:

        async def away(*_: object) -> None:
            raise Unavailable("is away")

        patched.setattr(ReplayStore, "delete_old", away)
        assert (await world.cli("replay", "spans", "--abandon")).code == 3
    again = await world.cli("replay", "spans", "--from-offset", "0", "--rebuild")
    assert (again.code, "is being ended with --abandon" in again.err) == (1, True), again
    ended = await world.cli("replay", "spans", "--abandon")
    assert (ended.code, "Ended 1 unfinished replay" in ended.out) == (0, True), ended
    nothing = await world.cli("replay", "spans", "--abandon")
    assert (nothing.code, "No unfinished replay" in nothing.out) == (0, True), nothing


async def test_what_others_took_meanwhile_is_theirs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another claims after --abandon has; then one goes on with what --abandon has ended since it asked."""
    await _dead(world, "inserted")
    claim = ReplayStore.claim

    async def outdone(store: ReplayStore, partitions: Sequence[Partition]) -> None:
        await claim(store, partitions)
        other = ReplayStore(world.settings.clickhouse, 30, world.settings.redaction)
        await other.connect()
        try:
            await claim(other, partitions)
        finally:
            await other.close()

    with monkeypatch.context() as patched:
        patched.setattr(ReplayStore, "claim", outdone)
        refused = await world.cli("replay", "spans", "--abandon")
        assert (refused.code, "nothing is ended" in refused.err) == (1, True), refused
    assert world.ask("SELECT count() FROM replay_log WHERE state IN ('ending', 'abandoned')") == [(0,)]

    async def late(store: ReplayStore, partitions: Sequence[Partition]) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(ReplayStore, "claim", claim)
            assert await asyncio.to_thread(command.abandon, world.settings, ABANDON) == 0
        await claim(store, partitions)

    monkeypatch.setattr(ReplayStore, "claim", late)
    done = await world.cli("replay", "spans", "--from-offset", "0", "--rebuild")
    assert (done.code, "another `fulgurite replay`" in done.err) == (1, True), done


async def test_one_that_wakes_takes_nothing_back_of_a_later_replay(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _dead(world, "inserted")
    delete_new = ReplayStore.delete_new

    async def after_the_others(store: ReplayStore, where: Range, since_ms: int, until_ms: int) -> None:
        monkeypatch.setattr(ReplayStore, "delete_new", delete_new)
        await asyncio.to_thread(command.abandon, world.settings, ABANDON)
        await _dead(world, "whole")
        before = world.ask("SELECT count() FROM spans")
        assert before > [(80,)]
        await delete_new(store, where, since_ms, until_ms)
        assert world.ask("SELECT count() FROM spans") == before

    monkeypatch.setattr(ReplayStore, "delete_new", after_the_others)
    assert await asyncio.to_thread(command.abandon, world.settings, ABANDON) == 0
    await asyncio.to_thread(command.replay, world.settings, REBUILD, as_json=True)

"""What the fence stands on, asked of the real engine: a later insert is refused, one that has begun is seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fulgurite.consumers.materialiser.blocks import BOTH_TABLES, OWN_TABLE, TOO_SLOW, Partition, Slice
from fulgurite.consumers.materialiser.errors import Fenced, TooSlow
from fulgurite.consumers.materialiser.fences import greater_fence, renewed
from fulgurite.consumers.materialiser.store import LogEntry, Store
from fulgurite.consumers.materialiser.topic import MOST_PARTITIONS
from fulgurite.schemas import topics
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.settings import ClickHouseSettings
from tests.consumers.materialiser_fakes import FakeRecord

PARTS = [Partition(topics.SPANS, "it's.spans", number) for number in range(3)]


@pytest.fixture
async def stores(clickhouse_settings: ClickHouseSettings) -> AsyncIterator[list[Store]]:
    """Of two materialisers."""
    await asyncio.to_thread(apply_migrations, clickhouse_settings)
    found = [Store(clickhouse_settings, 30, name) for name in ("one", "two")]
    for store in found:
        await store.connect()
    yield found
    for store in found:
        await store.close()


def slices(parts: Sequence[Partition], offset: int, fence: str, size: int = 0) -> list[Slice]:
    value = b'{"span_id":"s","name":"n","start_ns":1,"end_ns":2}\n{"poison":1}' + size * b" "
    record: Any = FakeRecord(offset, value, b"r")
    return [Slice(part, [record], fence=fence) for part in parts]


async def test_an_insert_under_an_older_fence_is_refused_with_all_its_partitions(stores: list[Store]) -> None:
    one, two = stores
    nobodys = slices(PARTS, 0, "")
    with pytest.raises(Fenced):
        await one.insert(nobodys, one.guard(nobodys))
    first = await one.fence(PARTS)
    before = slices(PARTS, 1, first)
    await one.insert(before, one.guard(before))
    second = await two.fence(PARTS[1:2])
    assert second > first
    late = slices(PARTS, 2, first)
    with pytest.raises(Fenced):
        await one.insert(late, one.guard(late))
    with pytest.raises(Fenced):
        await one.insert_dead(late[1], "refused", one.guard(late[1:2]))
    untouched = [late[0], late[2]]
    await one.insert(untouched, one.guard(untouched))
    mended = slices(PARTS[1:2], 2, second)
    await two.insert(mended, two.guard(mended))
    present = await two.present(dict.fromkeys(PARTS, 0))
    assert present == {part: {1: 3, 2: 3} for part in PARTS}


async def test_an_insert_of_as_many_partitions_as_one_may_have_is_understood(
    clickhouse_settings: ClickHouseSettings,
) -> None:
    """Where all that is in its guard is as long as it gets."""
    await asyncio.to_thread(apply_migrations, clickhouse_settings)
    parts = [Partition(topics.SPANS, "it's.spans", 90_000 + number) for number in range(MOST_PARTITIONS)]
    store = Store(clickhouse_settings, 30, 63 * "h" + "-4194304")
    await store.connect()
    try:
        fence = await store.fence(parts)
        await store.write_fence(parts, fence := renewed(fence))
        await store.log([LogEntry(part, 10**18, 10**18 + 9, 1) for part in parts])
        several = [replace(part, mark=10**18) for part in slices(parts, 10**18 + 10, fence)]
        await store.insert(several, store.guard(several))
        assert await store.present(dict.fromkeys(parts, 10**18)) == {part: {10**18 + 10: 3} for part in parts}
    finally:
        await store.close()


async def test_fences_that_are_taken_at_once_differ(stores: list[Store]) -> None:
    fences = await asyncio.gather(*(store.fence(PARTS) for store in stores for _ in range(5)))
    assert len(set(fences)) == 10
    greatest = slices(PARTS, 0, max(fences))
    await stores[0].insert(greatest, stores[0].guard(greatest))
    for fence in set(fences) - {max(fences)}:
        with pytest.raises(Fenced):
            await stores[0].insert(slices(PARTS, 0, fence), stores[0].guard(slices(PARTS, 0, fence)))


def test_a_renewed_fence_gives_way_to_whoever_fenced_since() -> None:
    own = greater_fence("", "replay")
    later = greater_fence(own, "replay")
    assert own < renewed(own) < renewed(renewed(own)) < later < renewed(later)
    for low, high in [sorted((greater_fence("", "replay"), own))]:  # taken at once
        assert renewed(low) < high


async def test_an_insert_that_has_begun_is_seen_until_it_is_over(
    stores: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its body is on its way when the next owner fences: the guard has let it through."""
    one, two = stores
    begun = slices(PARTS[:2], 0, await one.fence(PARTS), size=4_000_000)
    held = asyncio.Event()

    class Slow:
        def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
            self._pieces = pieces

        async def __aiter__(self) -> AsyncIterator[bytes]:
            body = b"".join(self._pieces)
            yield body[: len(body) // 2]  # more than the server reads before it begins
            await held.wait()
            yield body[len(body) // 2 :]

    monkeypatch.setattr("fulgurite.consumers.materialiser.store.Pieces", Slow)
    inserting = asyncio.create_task(one.insert(begun, one.guard(begun)))
    await until(two, PARTS[1:], running=True)
    assert not await two.running(PARTS[2:])
    await two.fence(PARTS)
    assert await two.running(PARTS[:1])
    held.set()
    await inserting
    await until(two, PARTS, running=False)  # it is seen a moment longer than its answer takes
    present = await two.present(dict.fromkeys(PARTS, 0))
    assert [present[part].get(0, 0) & OWN_TABLE for part in PARTS] == [1, 1, 0]


async def test_an_insert_that_may_take_longer_is_waited_for_by_server_and_client(
    stores: list[Store], clickhouse_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was given up as too slow, with its fence renewed, counts as there in both tables."""

    class Slow:
        def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
            self._pieces = pieces

        async def __aiter__(self) -> AsyncIterator[bytes]:
            body = b"".join(self._pieces)
            yield body[: len(body) // 2]
            await asyncio.sleep(0.8)
            yield body[len(body) // 2 :]

    monkeypatch.setattr("fulgurite.consumers.materialiser.store.ANSWER_SECONDS", 0)
    hasty = Store(clickhouse_settings, 0.4, "hasty")
    await hasty.connect()
    monkeypatch.setattr("fulgurite.consumers.materialiser.store.Pieces", Slow)
    one = slices(PARTS[:1], 0, await stores[0].fence(PARTS), size=4_000_000)
    with pytest.raises(TooSlow):
        await hasty.insert(one, hasty.guard(one))
    await until(stores[0], PARTS, running=False)
    anew = slices(PARTS[:1], 0, await stores[0].fence(PARTS), size=4_000_000)
    with pytest.raises(Fenced):
        await hasty.insert(one, hasty.guard(one), 8)
    await hasty.insert(anew, hasty.guard(anew), 8)
    monkeypatch.undo()
    given_up = slices(PARTS[:1], 1, anew[0].fence)
    await hasty.insert_dead(given_up[0], "takes too long", hasty.guard(given_up), TOO_SLOW)
    assert (await stores[0].present({PARTS[0]: 0}))[PARTS[0]] == {0: BOTH_TABLES, 1: BOTH_TABLES}
    await hasty.close()


async def until(store: Store, parts: Sequence[Partition], *, running: bool) -> None:
    async with asyncio.timeout(30):
        while await store.running(parts) != running:  # noqa: ASYNC110 (the server has nothing to wait on)
            await asyncio.sleep(0.01)

"""`fulgurite replay` of a log that is not the one of the tables: refused, and every row is left as it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fulgurite.infra.topics import create_topics, delete_topics
from fulgurite.schemas import topics
from fulgurite.schemas.settings import Settings
from tests.infra.dlq_world import World, span

SPANS = "SELECT _offset, span_id, name FROM spans ORDER BY _offset"
REPLAY = ("replay", "spans", "--from-offset", "0")


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> World:
    return World(settings, tmp_path)


async def filled(world: World, count: int) -> None:
    async with world.materialiser():
        await world.produce(topics.SPANS, [span(span_id=f"old{number}") for number in range(count)])
        await world.until("SELECT max(hi) FROM ingest_log", lambda rows: rows == [(count - 1,)])


async def test_a_topic_that_was_made_anew_is_not_replayed_over_the_old_rows(world: World) -> None:
    await filled(world, 10)
    world.ask("DELETE FROM spans WHERE _offset = 3")
    await delete_topics(world.settings.kafka)
    await asyncio.sleep(1)
    await create_topics(world.settings.kafka)
    await world.produce(topics.SPANS, [span(span_id=f"new{number}") for number in range(8)])
    before = world.ask(SPANS)
    for more in ([], ["--rebuild"]):
        done = await world.cli(*REPLAY, *more)
        assert (done.code, "has another record at offset 0 than ClickHouse has a row of" in done.err) == (1, True), done
        assert world.ask(SPANS) == before
    assert world.ask("SELECT count() FROM replay_log") == [(0,)], "nothing was begun"
    # A partition of which the tables have nothing is replayed.
    assert (await world.cli(*REPLAY, "--partition", "1")).code == 0


async def test_a_row_of_another_record_is_met_wherever_it_is(world: World) -> None:
    """Before the places that are looked at first."""
    await filled(world, 80)
    world.ask(
        "INSERT INTO spans SELECT * REPLACE (_ts - INTERVAL 1 HOUR AS _ts, 'old' AS name) FROM spans "
        "WHERE _offset BETWEEN 9 AND 19"
    )
    world.ask("DELETE FROM spans WHERE name = 'n'")
    before = world.ask(SPANS)
    for more in (["--rebuild"], []):
        done = await world.cli(*REPLAY, *more)
        assert (done.code, "not replayed any further" in done.err, "at offset 9" in done.err) == (1, True, True), done
        assert world.ask(SPANS) == before
        assert (await world.cli("replay", "spans", "--abandon")).code == 0
    assert (await world.cli(*REPLAY, "--to-offset", "9")).code == 0
    assert world.ask("SELECT count() FROM spans WHERE _offset < 9 AND name = 'n'") == [(9,)]

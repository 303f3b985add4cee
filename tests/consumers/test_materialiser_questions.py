"""Questions stay within what ClickHouse reads of one, and one that it cannot read is no outage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

import pytest

from fulgurite.consumers.materialiser import questions
from fulgurite.consumers.materialiser.blocks import OWN_TABLE, Partition
from fulgurite.consumers.materialiser.errors import NotUnderstood
from fulgurite.consumers.materialiser.history import MANY, RECORDS
from fulgurite.consumers.materialiser.questions import QUESTION_BYTES, times_queries
from fulgurite.consumers.materialiser.store import Store
from fulgurite.schemas import topics
from tests.consumers.materialiser_fakes import FakeStore, Member, Server
from tests.consumers.otlp_tables import Tables

NAME = "fulgurite.spans"


def partitions(count: int) -> list[Partition]:
    return [Partition(topics.SPANS, NAME, number) for number in range(count)]


async def test_times_are_asked_of_as_many_offsets_as_a_look_gives(tables: Tables) -> None:
    """Partitions whose leaders changed often: more text than the server reads in one piece."""
    tables.client.command(
        f"INSERT INTO spans (_topic, _partition, _offset, _ts) SELECT '{NAME}', number % 20, "
        "1000000000 + intDiv(number, 20), fromUnixTimestamp64Milli(toInt64(1000 + number)) FROM numbers(2000)"
    )
    tables.client.command(f"INSERT INTO dead_letters (_topic, _partition, _offset, _ts) VALUES ('{NAME}', 7, 5, 1)")
    asked = {
        part: [
            5,
            *(1_000_000_000 * begin + record for begin in range(MANY + 1) for record in range(RECORDS)),
        ]
        for part in partitions(20)
    }
    store = Store(tables.settings, 30, "test")
    await store.connect()
    try:
        found = await store.times(asked)
    finally:
        await store.close()
    wanted = {part: {10**9 + at: 1000 + 20 * at + part.number for at in range(100)} for part in asked}
    wanted[partitions(8)[7]][5] = 1_000
    assert found == wanted


async def test_what_is_there_is_asked_of_as_many_partitions_as_a_topic_may_have(tables: Tables) -> None:
    tables.client.command(
        f"INSERT INTO spans (_topic, _partition, _offset) SELECT '{NAME}', number, 1000000000 + number "
        "FROM numbers(6000)"
    )
    asked = {part: 10**9 + max(part.number, 3_000) for part in partitions(6_000)}
    store = Store(tables.settings, 30, "test")
    await store.connect()
    try:
        found = await store.present(asked)
    finally:
        await store.close()
    assert found == {
        part: {10**9 + part.number: OWN_TABLE} if part.number >= 3_000 else dict[int, int]() for part in asked
    }


@pytest.mark.parametrize("most", [64, 150, 10_000])
def test_each_offset_is_asked_for_once(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(questions, "QUESTION_BYTES", most)
    asked: dict[Partition, Collection[int]] = {part: range(10 * part.number) for part in partitions(4)}
    found = [text.partition("AND (")[2].removesuffix(")") for text in times_queries("spans", asked)]
    assert all(len(where) <= most for where in found)
    places: list[tuple[int, int]] = []
    for clause in " OR ".join(found).split(" OR "):
        number, _, some = clause.removeprefix("(_partition = ").removesuffix("))").partition(" AND _offset IN (")
        places += [(int(number), int(offset)) for offset in some.split(", ")]
    assert sorted(places) == [(part.number, offset) for part, some in asked.items() for offset in some]
    assert QUESTION_BYTES < 256 * 1024


async def test_what_the_server_cannot_read_is_said_to_be_a_defect(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(questions, "QUESTION_BYTES", 2**30)
    asked = {part: [10**18 + at for at in range(15_000)] for part in partitions(1)}
    store = Store(tables.settings, 30, "test")
    await store.connect()

    async def times(self: FakeStore, offsets: Mapping[Partition, Collection[int]]) -> dict[Partition, dict[int, int]]:
        return await store.times(asked)

    monkeypatch.setattr(FakeStore, "times", times)
    member = Member(Server())
    member.task = asyncio.create_task(member.writer.run())
    try:
        await member.until(lambda: "report it" in str(member.metrics.not_ready(60)))
        with pytest.raises(NotUnderstood, match=r"report it: .*[Mm]ax query size exceeded"):
            await store.times(asked)
    finally:
        await member.stop()
        await store.close()
    assert [record.levelname for record in caplog.records if "cannot resume" in record.getMessage()] == ["ERROR"]

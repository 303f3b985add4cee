"""One topic's writer against a server written by hand: one insert for all partitions, poison cut out, doubt resolved by
a new fence, bounds kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from aiokafka import TopicPartition

from fulgurite.consumers.materialiser import partition as partition_module
from fulgurite.consumers.materialiser import topic as topic_module
from fulgurite.consumers.materialiser.blocks import Letter, Partition, Slice, Unreadable, block, dead_block
from fulgurite.consumers.materialiser.store import LogEntry
from fulgurite.schemas import topics
from tests.consumers.materialiser_fakes import FakeRecord, Member, Server, partition


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def members(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Member]]:
    """Those that a test puts here are stopped in the end."""
    monkeypatch.setattr(topic_module, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(topic_module, "QUIET_SECONDS", 0.001)
    found: list[Member] = []
    yield found
    for member in found:
        await member.stop()


def records(offsets: Sequence[int], value: bytes = b"{}") -> list[FakeRecord]:
    return [FakeRecord(offset, value) for offset in offsets]


def ranges(entries: Sequence[LogEntry]) -> list[tuple[int, int, int]]:
    return [(entry.partition.number, entry.lo, entry.hi) for entry in entries]


async def test_one_insert_takes_the_records_of_all_partitions(server: Server, members: list[Member]) -> None:
    members.append(member := Member(server, range(64), batch_records=1_000))
    await member.start()
    assert len(set(server.fences.values())) == 1
    for number in range(64):
        member.append(number, records(range(10)))
    await member.until(lambda: len(member.finished) == 64)
    assert [len(insert) for insert in server.inserts] == [64]
    assert server.rows == {(number, offset): 1 for number in range(64) for offset in range(10)}


async def test_what_is_much_is_shared_by_two_inserts(
    server: Server, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_module, "SPLIT_BYTES", 1_000)
    members.append(member := Member(server, range(4)))
    await member.start()
    for number in range(4):
        member.append(number, records(range(10), b"x" * 100))
    await member.until(lambda: len(member.finished) == 4)
    assert sorted(sorted(number for number, _ in insert) for insert in server.inserts) == [[0, 2], [1, 3]]


async def test_an_insert_is_bounded_in_all_over_its_partitions(
    server: Server, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_module, "BATCH_LINES", 10)
    monkeypatch.setattr(topic_module, "LANES", 1)
    members.append(member := Member(server, range(2), topics.SPANS))
    await member.start()
    member.append(0, records([0], b"{}\n{}"))
    member.append(1, records(range(5), b"{}\n{}\n{}\n{}"))
    await member.until(lambda: len(server.rows) == 6)
    assert server.inserts[0] == [(0, [0]), (1, [0, 1])]
    assert all(sum(len(offsets) for _, offsets in insert) <= 3 for insert in server.inserts)


async def test_an_insert_has_no_more_partitions_than_its_guard_has_room_for(
    server: Server, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each has its turn, however much those before it still have."""
    monkeypatch.setattr(topic_module, "MOST_PARTITIONS", 3)
    members.append(member := Member(server, range(8), batch_records=3))
    await member.start()
    for number in range(8):
        member.append(number, records(range(10)))
    await member.until(lambda: len({number for number, _ in server.rows}) == 8)
    assert len(server.rows) < 40
    await member.until(lambda: len(server.rows) == 80)
    assert max(len(insert) for insert in server.inserts) == 3


async def test_a_record_larger_than_an_insert_may_be_goes_alone(
    server: Server, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_module, "BATCH_BYTES", 1_000)
    members.append(member := Member(server, range(3)))
    await member.start()
    for number in range(3):
        member.append(number, [FakeRecord(0, b"x" * 2_000), FakeRecord(1)])
    await member.until(lambda: len(server.rows) == 6)


async def test_what_clickhouse_refuses_is_cut_out_of_its_partition(server: Server, members: list[Member]) -> None:
    members.append(member := Member(server, range(3)))
    await member.start()
    for number in range(3):
        refused = {3, 17} if number == 1 else set[int]()
        member.append(number, [FakeRecord(n, b"refused" if n in refused else b"{}") for n in range(20)])
    await member.until(lambda: len(member.finished) == 3)
    assert server.dead == {(1, 3): 1, (1, 17): 1}
    assert set(server.rows) == {(number, n) for number in range(3) for n in range(20)} - set(server.dead)
    assert set(server.rows.values()) == {1}


async def test_records_without_rows_are_dead_letters_of_one_insert_however_many_they_are(
    server: Server, members: list[Member]
) -> None:
    members.append(member := Member(server, range(3), batch_records=1_000))
    await member.start()
    for number in range(3):
        member.append(number, [FakeRecord(n, b"{}" if n % 3 else b"unreadable") for n in range(90)])
    await member.until(lambda: len(member.finished) == 3)
    assert len(server.inserts) == 2, "the dead letters of all partitions, and the others"
    places = [(number, n) for number in range(3) for n in range(90)]
    assert server.dead == {place: 1 for place in places if place[1] % 3 == 0}
    assert server.rows == {place: 1 for place in places if place[1] % 3}


async def test_one_without_rows_that_is_a_dead_letter_already_is_no_second_one(
    server: Server, members: list[Member]
) -> None:
    server.dead[0, 1] = 1
    members.append(member := Member(server, topic=topics.SPANS))
    await member.start()
    member.append(0, [FakeRecord(0), FakeRecord(1, b"unreadable"), FakeRecord(2)])
    await member.until(lambda: len(server.rows) == 2)
    assert server.dead == {(0, 1): 1}


async def test_after_doubt_only_what_is_missing_is_inserted_and_under_a_new_fence(
    server: Server, members: list[Member]
) -> None:
    members.append(member := Member(server, range(2)))
    await member.start()
    before = dict(server.fences)
    server.cut_short = 13
    for number in range(2):
        member.append(number, records(range(10)))
    await member.until(lambda: len(server.rows) == 20)
    assert server.inserts[1:] == [[(1, list(range(3, 10)))]]
    assert set(server.rows.values()) == {1}
    assert all(server.fences[number] > before[number] for number in range(2))


async def _insert_under_way(member: Member) -> asyncio.Event:
    """What it waits for; of offsets 0 to 9, and there is none at 4."""
    member.store.gate = gate = asyncio.Event()
    member.append(0, records([0, 1, 2, 3, 5, 6, 7, 8, 9]))
    await member.store.begun.wait()
    return gate


@pytest.mark.parametrize("why", ["a leader's epoch", "the log of inserts failed"])
async def test_a_partition_doubted_while_an_insert_of_it_succeeds_goes_on(
    server: Server, members: list[Member], why: str
) -> None:
    members.append(member := Member(server))
    await member.start()
    gate = await _insert_under_way(member)
    if why == "a leader's epoch":
        member.writer.doubt(TopicPartition("rollouts", 0), why)
    else:
        member.writer.unsettle(partition())
    await asyncio.sleep(0.01)  # the settler looks, and finds it busy
    gate.set()
    await member.until(lambda: len(member.finished) == 1)
    assert (ranges(member.finished), member.finished[0].gaps) == ([(0, 0, 9)], [(4, 4)])
    await member.until(lambda: member.buffers[0].settled)
    member.append(0, records(range(10, 20)))
    await member.until(lambda: len(server.rows) == 19)
    assert set(server.rows.values()) == {1}


async def test_what_was_doubted_while_an_insert_of_it_fails_is_read_anew_and_comes_once(
    server: Server, members: list[Member]
) -> None:
    members.append(member := Member(server))
    await member.start()
    gate = await _insert_under_way(member)
    member.store.fails = True
    member.writer.doubt(TopicPartition("rollouts", 0), "a leader's epoch")
    gate.set()
    await member.until(lambda: member.buffers[0].settled)
    assert (member.consumer.at, member.budget.used) == ({0: 0}, 0), "Kafka gives them again"
    member.store.fails = False
    member.append(0, records([0, 1, 2, 3, 5, 6, 7, 8, 9]))
    await member.until(lambda: len(member.finished) == 1)
    await asyncio.sleep(0.05)
    assert (sum(server.rows.values()), member.finished[0].gaps) == (9, [(4, 4)])


async def test_a_record_of_lines_is_inserted_again_for_the_table_that_lacks_its_part(
    server: Server, members: list[Member]
) -> None:
    server.rows.update([(0, 0), (0, 1)])
    members.append(member := Member(server, topic=topics.SPANS))
    await member.start()
    assert member.consumer.at == {0: 0}
    member.append(0, [FakeRecord(0, b"both"), FakeRecord(1), FakeRecord(2, b"both")])
    await member.until(lambda: bool(member.finished))
    assert server.rows == {(0, 0): 1, (0, 1): 1, (0, 2): 1}
    assert server.dead == {(0, 0): 1, (0, 2): 1}


async def test_offsets_that_are_in_the_tables_are_skipped(server: Server, members: list[Member]) -> None:
    server.rows.update((0, offset) for offset in (0, 1, 2, 3, 4, 7))
    server.log[0] = 3
    members.append(member := Member(server))
    await member.start()
    assert member.consumer.at == {0: 5}
    assert member.group.claimed == [{TopicPartition("rollouts", 0): 3}]
    member.append(0, records(range(5, 10)))
    await member.until(lambda: len(member.finished) == 2)
    assert ranges(member.finished) == [(0, 3, 4), (0, 5, 9)]
    assert server.inserts == [[(0, [5, 6, 8, 9])]]


@pytest.mark.parametrize("slow", [False, True])
async def test_an_insert_that_needs_too_much_memory_or_time_is_made_smaller(
    server: Server, members: list[Member], monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    server.times_out = slow
    monkeypatch.setattr(topic_module, "LEAST_BATCH_BYTES", 100)
    server.most_records = 7
    members.append(member := Member(server, range(2)))
    await member.start()
    for number in range(2):
        member.append(number, records(range(20)))
    await member.until(lambda: len(server.rows) == 40)
    assert set(server.rows.values()) == {1}
    server.most_records = 100
    member.append(0, records(range(20, 50)))
    await member.until(lambda: len(server.rows) == 70)
    assert len(server.inserts[-1][0][1]) > 7, "it grows again"


async def test_who_is_not_of_the_group_goes_no_further(server: Server, members: list[Member]) -> None:
    members.append(member := Member(server))
    member.group.ours = False
    member.task = asyncio.create_task(member.writer.run())
    await member.until(lambda: member.buffers[0].closed)
    member.append(0, records(range(3)))
    await asyncio.sleep(0.05)
    assert (server.fences, server.inserts, member.budget.used) == ({}, [], 0)


async def test_an_owner_whose_fence_was_taken_settles_again(server: Server, members: list[Member]) -> None:
    members.append(member := Member(server))
    await member.start()
    server.fences[0] = "000000000007 a zombie"
    member.append(0, records(range(3)))
    await member.until(lambda: bool(member.finished))
    assert server.rows == {(0, 0): 1, (0, 1): 1, (0, 2): 1}
    assert server.fences[0].startswith("000000000008 a ")


async def test_a_running_insert_of_a_predecessor_is_waited_for(server: Server, members: list[Member]) -> None:
    server.running.append({0})
    members.append(member := Member(server, range(2)))
    member.task = asyncio.create_task(member.writer.run())
    await member.until(lambda: len(server.fences) == 2)
    await asyncio.sleep(0.05)
    assert not any(buffer.settled for buffer in member.buffers.values())
    server.running.clear()
    await member.until(lambda: all(buffer.settled for buffer in member.buffers.values()))


async def test_a_full_buffer_pauses_its_partition_until_it_is_drained(
    server: Server, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "BATCH_BYTES", 2_000)
    members.append(member := Member(server, range(2), share_bytes=2_000))
    await member.start()
    member.append(0, records(range(3), b"x" * 1_000))
    assert member.consumer.paused == {0}
    await member.until(lambda: not member.consumer.paused)
    await member.until(lambda: len(server.rows) == 3)
    assert member.budget.used == 0


def test_a_record_of_too_many_lines_is_not_even_split() -> None:
    with pytest.raises(Unreadable, match="has 4,000,001 lines, of at most 200,000"):
        block([Slice(partition(0, topics.SPANS), cast(Any, [FakeRecord(0, b"x\n" * 4_000_000)]))])


def test_a_block_has_the_lines_of_all_partitions_by_rollout() -> None:
    one = Slice(partition(0, topics.SPANS), cast(Any, [FakeRecord(5, b'{"a":1}\n{"a":2}', b"r2")]), {5: 1})
    two = Slice(partition(3, topics.SPANS), cast(Any, [FakeRecord(9, b'{"a":3}', b"r1", 7)]))
    found = block([one, two]).select(["raw", "key", "_partition", "_offset", "_index", "_into"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (b'{"a":3}', b"r1", 3, 9, 0, 3),
        (b'{"a":1}', b"r2", 0, 5, 0, 2),
        (b'{"a":2}', b"r2", 0, 5, 1, 2),
    ]


def test_a_clock_of_any_year_makes_a_dead_letter() -> None:
    late = FakeRecord(0, b"x")
    late.timestamp = 10**15
    row = dead_block([Letter(Partition(topics.SPANS, "spans", 0), cast(Any, late), "no")])
    assert (row.num_rows, row["_ts"].cast("int64").to_pylist()) == (1, [10**15])

"""One partition's buffer: whatever order records, inserts and settling come in, it takes each record that the tables
lack, once, and none that they have."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from fulgurite.consumers.materialiser.blocks import BOTH_TABLES, DEAD_LETTERS_TABLE, OWN_TABLE
from fulgurite.consumers.materialiser.partition import Budget, PartitionBuffer, Room
from fulgurite.schemas import topics
from tests.consumers.materialiser_fakes import FakeConsumer, FakeRecord, partition


class Reader:
    """A buffer of spans, whose log is as long as one asks, and the tables beside it."""

    def __init__(self) -> None:
        self.consumer = FakeConsumer()
        self.buffer = PartitionBuffer(partition(0, topics.SPANS), self.consumer, Budget(), 1_000, 1 << 20)
        self.tables: dict[int, int] = {}
        self.fetched = 0

    def settle(self) -> None:
        self.consumer.at.clear()
        self.buffer.settle("fence", 0, self.tables)
        self.fetched = self.consumer.at.get(0, self.fetched)

    def fetch(self, count: int) -> None:
        self.buffer.append(cast(Any, [FakeRecord(at) for at in range(self.fetched, self.fetched + count)]))
        self.fetched += count

    def take(self, count: int) -> list[int]:
        found = self.buffer.take(Room(count), at_least_one=True) if self.buffer.ready else None
        return [record.offset for record in found.records] if found else []

    def insert(self, count: int) -> list[int]:
        taken = self.take(count)
        if taken:
            assert not [at for at in taken if self.tables.get(at) == BOTH_TABLES]
            self.tables |= dict.fromkeys(taken, BOTH_TABLES)
            self.buffer.done()
        return taken

    def lose_the_answer(self, count: int, arrive: int) -> None:
        """Of an insert, whose first records are in all the same."""
        taken = self.take(count)
        if taken:
            self.tables |= dict.fromkeys(taken[:arrive], BOTH_TABLES)
            self.buffer.give_back()


def test_what_is_there_is_skipped_also_when_it_is_fetched_after_what_came_before_was_inserted() -> None:
    reader = Reader()
    reader.tables = {0: DEAD_LETTERS_TABLE, 1: BOTH_TABLES, 2: OWN_TABLE}
    reader.settle()
    reader.fetch(1)
    assert reader.insert(10) == [0]
    reader.fetch(3)
    assert reader.insert(10) == [2, 3]


def test_what_another_owner_inserted_meanwhile_is_skipped_when_it_is_fetched() -> None:
    reader = Reader()
    reader.settle()
    reader.fetch(2)
    reader.lose_the_answer(2, arrive=2)
    reader.tables |= {2: BOTH_TABLES, 3: BOTH_TABLES}
    reader.settle()
    reader.fetch(4)
    assert reader.insert(10) == [4, 5]


TABLES = st.dictionaries(st.integers(0, 30), st.sampled_from([OWN_TABLE, DEAD_LETTERS_TABLE, BOTH_TABLES]))
COUNT = st.integers(1, 8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("fetch"), COUNT, st.just(0)),
        st.tuples(st.just("insert"), COUNT, st.just(0)),
        st.tuples(st.just("lose"), COUNT, st.integers(0, 8)),
        st.tuples(st.just("other owner"), st.integers(0, 8), COUNT),
    ),
    max_size=40,
)


@given(TABLES, STEPS)
def test_each_record_is_taken_until_it_is_there_and_then_no_more(
    tables: dict[int, int], steps: list[tuple[str, int, int]]
) -> None:
    reader = Reader()
    reader.tables = tables
    reader.settle()
    for what, count, more in steps:
        if what == "fetch":
            reader.fetch(count)
        elif what == "insert":
            reader.insert(count)
        else:
            reader.lose_the_answer(count, more)
            if not reader.buffer.settled:
                if what == "other owner":
                    begin = reader.buffer.first + count
                    reader.tables |= dict.fromkeys(range(begin, begin + more), BOTH_TABLES)
                reader.settle()
    reader.fetch(10)
    while reader.insert(1_000):
        pass
    assert reader.buffer.first >= reader.fetched
    assert {at for at, found in reader.tables.items() if found == BOTH_TABLES} >= set(range(reader.buffer.first))


def test_each_range_at_which_no_record_came_is_said_once() -> None:
    reader = Reader()
    reader.settle()
    buffer = reader.buffer
    buffer.append(cast(Any, [FakeRecord(at) for at in (0, 3, 4, 9)]))
    reader.take(2)
    buffer.done()
    assert buffer.gaps(3) == [(1, 2)]
    reader.take(1)
    buffer.give_back()
    reader.tables = dict.fromkeys((0, 3, 4), BOTH_TABLES)
    buffer.settle("fence", 1, reader.tables)
    assert buffer.first == 1, "it reads again from what may be a marker"
    buffer.append(cast(Any, [FakeRecord(at) for at in (3, 4, 9)]))
    assert reader.take(5) == [9]
    buffer.done()
    assert buffer.gaps(9) == [(1, 2), (5, 8)]
    buffer.hold()
    buffer.release(12)
    buffer.append(cast(Any, [FakeRecord(12)]))
    assert (buffer.gaps(12), buffer.gaps(12)) == ([(10, 11)], [])

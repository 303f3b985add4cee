"""Records that alone need too much memory or time: when one is given up, and that nobody else waits for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pytest

from fulgurite.consumers.materialiser import lone as lone_module
from fulgurite.consumers.materialiser import topic as topic_module
from fulgurite.consumers.materialiser.blocks import OWN_TABLE, TOO_LARGE, TOO_SLOW, Slice
from fulgurite.consumers.materialiser.contents import BEGINNING_BYTES, Body
from fulgurite.consumers.materialiser.errors import TooLarge, TooSlow
from fulgurite.consumers.materialiser.fences import Guard
from fulgurite.consumers.materialiser.lone import (
    HEAVY_BYTES,
    HOPELESS_BYTES,
    MOST_TIMES,
    SECONDS,
    SLOW_TRIES,
    TRIES,
    Lone,
)
from fulgurite.consumers.materialiser.store import Store
from fulgurite.consumers.materialiser.weight import weight
from fulgurite.schemas import topics
from fulgurite.schemas.settings import ClickHouseSettings
from tests.consumers.materialiser_fakes import FakeRecord, Member, Server, partition
from tests.consumers.otlp_encoding import resource_spans, scope_spans, span, traces

MIB = 1 << 20
OF_ONE = TooLarge("code 241, Query memory limit exceeded: would use 3.80 GiB, maximum: 3.73 GiB")
TOTAL = TooLarge(
    "code 241, (total) memory limit exceeded: would use 1.81 GiB (attempt to allocate chunk of 4.16 MiB), "
    "current RSS: 1.71 GiB, maximum: 2.00 GiB. OvercommitTracker decision: Query was selected to stop"
)
NO_NUMBER = TooLarge("code 173, Allocator: Cannot mmap 64.00 MiB, errno: 12, strerror: Cannot allocate memory")
SLOW = TooSlow("code 159, Timeout exceeded")


@pytest.fixture
async def members(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Member]]:
    """Those that a test puts here are stopped in the end."""
    monkeypatch.setattr(topic_module, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(topic_module, "QUIET_SECONDS", 0.001)
    monkeypatch.setattr(topic_module, "LEAST_BATCH_BYTES", 2**30)
    monkeypatch.setattr(lone_module, "SECONDS", 0.0)
    found: list[Member] = []
    yield found
    for member in found:
        await member.stop()


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any record is."""
    monkeypatch.setattr(lone_module, "HEAVY_BYTES", 0)


def slices(*offsets: int) -> list[Slice]:
    return [Slice(partition(), cast(Any, [FakeRecord(offset) for offset in offsets]))]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def after_failures(error: TooLarge | TooSlow, bytes: int, *, alone: bool = True, count: int = 100) -> Lone:
    lone = Lone(clock := Clock())
    for _ in range(count):
        lone.failed(slices(7), error, bytes, alone=alone)
    clock.now += SECONDS
    return lone


@pytest.mark.parametrize(
    ("error", "bytes", "alone", "given_up"),
    [
        (OF_ONE, 1_000, False, True),
        (TOTAL, 900_000, True, False),
        (TOTAL, 200 * MIB, True, False),
        (TOTAL, 210 * MIB, True, True),
        (TOTAL, 210 * MIB, False, False),
        (TOTAL, 1_100 * MIB, False, True),
        (TooLarge("User memory limit exceeded: would use 1 GiB, maximum: 500.00 MiB."), 60 * MIB, True, True),
        (NO_NUMBER, 400 * MIB, True, False),
        (NO_NUMBER, 600 * MIB, True, True),
    ],
)
def test_a_record_is_to_blame_for_memory_where_it_is_much_of_the_bound(
    error: TooLarge, bytes: int, alone: bool, given_up: bool
) -> None:
    found = after_failures(error, bytes, alone=alone).hopeless(slices(7))
    assert (found is not None and found[0] == TOO_LARGE) == given_up


def test_it_is_given_up_after_many_failures_and_some_time() -> None:
    lone = Lone(clock := Clock())
    lone.failed_together(slices(7, 8), least=True)
    assert lone.singly
    for tries in range(TRIES):
        assert lone.tries(slices(7)) == tries
        lone.failed(slices(7), OF_ONE, 0, alone=False)
    assert lone.suspects(partition(), 7)
    assert lone.hopeless(slices(7)) is None
    clock.now += SECONDS
    assert lone.hopeless(slices(7, 8)) is None
    assert "more memory" in str(lone.hopeless(slices(7)))
    assert lone.hopeless([replace(slices(7)[0], present={7: OWN_TABLE})]) is None
    lone.done(slices(7, 8))
    assert not lone.singly
    assert not lone.suspects(partition(), 7)


def test_who_takes_too_long_gets_more_time_and_is_given_up_only_if_it_is_large() -> None:
    assert [after_failures(SLOW, HEAVY_BYTES, count=n).times(slices(7)) for n in range(7)] == [1, 2, 4, 8, 16, 16, 16]
    assert after_failures(SLOW, HEAVY_BYTES - 1).times(slices(7)) == 1
    assert after_failures(SLOW, HOPELESS_BYTES - 1).hopeless(slices(7)) is None
    until_most = MOST_TIMES.bit_length() - 1
    assert after_failures(SLOW, HOPELESS_BYTES, count=until_most + SLOW_TRIES - 1).hopeless(slices(7)) is None
    found = after_failures(SLOW, HOPELESS_BYTES, count=until_most + SLOW_TRIES).hopeless(slices(7))
    assert found is not None
    assert found[0] == TOO_SLOW


def test_a_record_weighs_what_its_spans_get_of_their_resource() -> None:
    spans = [span({}, span_id=number.to_bytes(8, "big")) for number in range(1, 1_001)]
    value = traces(resource_spans({"environment": "x" * 10_000}, scope_spans(spans)))
    found = weight(topics.OTLP_SPANS, cast(Any, FakeRecord(0, value)))
    assert 10_000_000 < found < 12_000_000
    assert weight(topics.OTLP_SPANS, cast(Any, FakeRecord(0, b"\xff\xff"))) < 1_000
    lines = FakeRecord(0, b"{}\n" * 1_000, b"k" * 4_000)
    assert 4_000_000 < weight(topics.SPANS, cast(Any, lines)) < 6_000_000
    assert weight(topics.ROLLOUTS, cast(Any, lines)) < 10_000


async def test_a_record_that_alone_needs_too_much_memory_becomes_a_dead_letter(members: list[Member]) -> None:
    members.append(member := Member(server := Server()))
    await member.start()
    member.append(0, with_huge(9, at=3))
    await member.until(lambda: len(server.rows) == 8 and len(server.dead) == 1)
    assert set(server.dead) == {(0, 3)}
    assert set(server.rows.values()) == {1}


class Cramped(Store):
    """Has no room for an insert of more than so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(ClickHouseSettings(), 1.0, "test")
        self.most_bytes = most_bytes
        self.letters: list[dict[str, Any]] = []

    async def _insert(self, into: str, body: Body, guard: Guard, times: int = 1) -> None:
        data = b"".join(bytes(piece) for piece in body.data)
        if len(data) > self.most_bytes:
            raise TooLarge("Query memory limit exceeded")
        self.letters += pa.ipc.open_stream(data).read_all().to_pylist()


async def test_of_a_record_that_is_too_large_even_as_a_letter_the_beginning_is_kept() -> None:
    """Kafka takes hundreds of MB of it, compressed: it must not hold up its partition for ever."""
    store = Cramped(2 * BEGINNING_BYTES)
    for offset, size in enumerate((BEGINNING_BYTES, 3 * BEGINNING_BYTES)):
        await store.insert_dead(Slice(partition(), [FakeRecord(offset, b"x" * size)]), "too large", Guard("test"))
    whole, cut = store.letters
    assert (len(whole["value"]), whole["message"]) == (BEGINNING_BYTES, "too large")
    assert (len(cut["value"]), cut["_offset"]) == (BEGINNING_BYTES, 1)
    assert "first 1,048,576 of its 3,145,728 bytes" in cut["message"]
    store.most_bytes = 0
    with pytest.raises(TooLarge):
        await store.insert_dead(Slice(partition(), [FakeRecord(2, b"x" * 3 * BEGINNING_BYTES)]), "", Guard("test"))


@pytest.mark.usefixtures("heavy")
async def test_a_slow_record_goes_in_when_it_has_enough_time(members: list[Member]) -> None:
    members.append(member := Member(server := Server(times_out=True, enough_times=8)))
    await member.start()
    member.append(0, with_huge(9, at=3))
    await member.until(lambda: len(server.rows) == 9)
    assert (set(server.rows.values()), len(server.dead)) == ({1}, 0)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("slow", [False, True])
async def test_nobody_waits_for_a_record_that_is_tried_for_ever(members: list[Member], slow: bool) -> None:
    """A part of it is present, so that it cannot become a dead letter."""
    server = Server(times_out=slow)
    server.rows.update([(0, 0), (1, 0)])
    members.append(member := Member(server, range(4), topics.SPANS))
    await member.start()
    for number in (0, 1):
        member.append(number, with_huge(10, at=0))
    for number in (2, 3):
        member.append(number, with_huge(40, at=-1))
    await member.until(lambda: len(server.rows) == 2 + 80)
    known = len(server.inserts)
    for more in range(1, 11):
        for number in (2, 3):
            member.append(number, [FakeRecord(offset) for offset in range(40 * more, 40 * more + 40)])
        await member.until(lambda: len(server.rows) == 2 + 80 * (more + 1))  # noqa: B023 (awaited here)
    later = server.inserts[known:]
    assert all(insert in ([(0, [0])], [(1, [0])]) for insert in later if insert[0][0] < 2)
    assert len([insert for insert in later if insert[0][0] >= 2]) <= 40
    assert not server.dead
    assert any(insert == [(1, [0])] for insert in server.inserts), "both are tried"


def with_huge(count: int, *, at: int) -> Sequence[FakeRecord]:
    return [FakeRecord(offset, b"huge" if offset == at else b"{}") for offset in range(count)]

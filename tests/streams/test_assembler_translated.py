"""The questions about the translator: how many, and what comes of no answer. Without Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from aiokafka.errors import GroupLoadInProgressError, KafkaConnectionError
from aiokafka.structs import TopicPartition

from fulgurite.schemas.settings import KafkaSettings
from fulgurite.streams.assembler import translated as translated_module
from fulgurite.streams.assembler.assembly import Assembly
from fulgurite.streams.assembler.inputs import Inputs
from fulgurite.streams.assembler.offsets import DataPartition, RolloutsPartition
from fulgurite.streams.assembler.rollouts import Pending
from fulgurite.streams.assembler.translated import Progress, Translator, Watch
from fulgurite.streams.assembler.waits import Waits
from fulgurite.streams.transactions import no_hook
from tests.streams.assembler_records import finished

KAFKA = KafkaSettings()
OTLP = TopicPartition("otlp_spans", 0)
ROLLOUTS, SPANS, REWARDS = (TopicPartition(f"fulgurite.{name}", 0) for name in ("rollouts", "spans", "rewards"))


class FakeInputs(Inputs):
    """The ends of `rewards` are at 7."""

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 7)


class FakeTranslator(Translator):
    """Says what it is told to, and counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__(KAFKA, FakeInputs(KAFKA))
        self.away = False
        self.refuses = False
        self.found = [OTLP]
        self.answer = Progress(in_use=True, ends={OTLP: 5}, read_to={OTLP: 0})
        self.asked = 0

    async def partitions(self) -> list[TopicPartition]:
        self.asked += 1
        if self.away:
            raise KafkaConnectionError("away")
        return self.found

    async def progress(self, partitions: list[TopicPartition]) -> Progress:
        if self.refuses:
            raise GroupLoadInProgressError("no answer")
        return self.answer


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(translated_module, "ASK_SECONDS", 0.01)
        monkeypatch.setattr(translated_module, "LOOK_SECONDS", 0.05)
        monkeypatch.setattr(translated_module, "FIRST_LOOK_SECONDS", 0.2)
        self.translator = FakeTranslator()
        self.waits = Waits(wait_seconds=1.0, settle_seconds=0.0)
        self.state = Assembly(
            [RolloutsPartition(ROLLOUTS, 0, 0, 0)],
            [DataPartition(SPANS, 0, 0, 0)],
            [DataPartition(REWARDS, 0, 0, 0)],
            max_open_rollouts=10,
            orphan_seconds=1.0,
            waits=self.waits,
        )
        self.changed = asyncio.Event()
        self.watch = Watch(self.translator, FakeInputs(KAFKA), self.state, self.changed, no_hook)

    def begin(self, count: int = 1) -> list[Pending]:
        found = [Pending(finished(f"r{number}"), ROLLOUTS, number) for number in range(count)]
        for pending in found:
            self.waits.begin(pending)
        return found

    async def runs(self, seconds: float) -> None:
        task = asyncio.create_task(self.watch.run())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_nothing_is_asked_while_nobody_waits_and_once_for_all_that_do(world: World) -> None:
    await world.watch.first_look()
    assert (world.waits.in_use, world.translator.asked) == (True, 1)
    await world.runs(0.1)
    assert world.translator.asked == 1
    found = world.begin(1_000)
    world.translator.answer = Progress(in_use=True, ends={OTLP: 5}, read_to={OTLP: 5})
    await world.runs(0.1)
    assert world.translator.asked == 2
    assert world.changed.is_set()
    assert all(not pending.waits and pending.barrier == {REWARDS: 7} for pending in found)


async def test_a_question_that_is_never_answered_does_not_hold_up_a_start(world: World) -> None:
    world.translator.refuses = True
    async with asyncio.timeout(5):
        await world.watch.first_look()
    assert not world.waits.in_use
    world.translator.refuses = False
    await world.runs(0.2)
    assert world.waits.in_use, "it is asked on"


async def test_a_start_waits_for_kafka_and_only_then_for_the_answer(world: World) -> None:
    """Else what is read first as Kafka comes back is emitted as if there were no translator."""
    world.translator.away = True
    looking = asyncio.create_task(world.watch.first_look())
    await asyncio.sleep(0.5)
    assert not looking.done()
    world.translator.away = False
    async with asyncio.timeout(5):
        await looking
    assert world.waits.in_use


async def test_no_topic_is_no_translator(world: World) -> None:
    world.translator.found = []
    await world.watch.first_look()
    assert (world.waits.in_use, world.translator.asked) == (False, 1)


@pytest.mark.parametrize("why", ["behind", "refused", "gone"])
async def test_everybody_is_let_go_in_the_end_whatever_is_not_answered(world: World, why: str) -> None:
    await world.watch.first_look()
    [pending] = world.begin()
    world.translator.refuses = why == "refused"
    world.translator.found = [] if why == "gone" else [OTLP]
    await world.runs(0.1)
    assert pending.waits
    await world.runs(1.5)
    assert (pending.waits, pending.barrier, world.state.counts["otlp_overdue"]) == (False, {}, 1)


async def test_time_without_kafka_does_not_count(world: World) -> None:
    await world.watch.first_look()
    [pending] = world.begin()
    world.translator.away = True
    await world.runs(1.5)
    world.translator.away = False
    await world.runs(0.1)
    assert pending.waits
    world.translator.answer = Progress(in_use=True, ends={OTLP: 9}, read_to={OTLP: 6})
    await world.runs(0.1)
    assert (pending.waits, pending.barrier) == (False, {REWARDS: 7}), "what was written later is not waited for"


async def test_a_translator_whose_offsets_are_forgotten_is_none(world: World) -> None:
    await world.watch.first_look()
    [pending] = world.begin()
    await world.runs(0.05)
    world.translator.answer = Progress(in_use=False, ends={OTLP: 5}, read_to={OTLP: 0})
    await world.runs(0.1)
    assert (pending.waits, world.waits.in_use, world.state.counts["otlp_overdue"]) == (False, False, 0)

"""Who waits for a reward in OTLP, for what and how long; what overtakes whom; nothing twice over any crash. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fulgurite.schemas.rollouts import RolloutFinished
from fulgurite.streams.assembler import offsets as offsets_module
from fulgurite.streams.assembler.offsets import MAX_AHEAD, RolloutsPartition, may_overtake
from fulgurite.streams.assembler.rollouts import Pending
from fulgurite.streams.assembler.waits import Waits
from tests.streams.assembler_records import finished, llm_call, reward, started
from tests.streams.test_assembler_assembly import World, play, run

OTLP = TopicPartition("otlp_spans", 0)
OTHER = TopicPartition("otlp_spans", 1)
REWARDS = TopicPartition("rewards", 0)
ROLLOUTS = TopicPartition("rollouts", 0)
SETTLE_SECONDS = 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pending(rollout_id: str, offset: int = 0) -> Pending:
    return Pending(finished(rollout_id), ROLLOUTS, offset)


def waits_by(clock: Clock) -> Waits:
    return Waits(wait_seconds=10.0, settle_seconds=1.0, clock=clock)


def test_a_reward_is_waited_for_from_the_ends_of_otlp_to_those_of_rewards() -> None:
    clock = Clock()
    waits = waits_by(clock)
    first, second = pending("a"), pending("b")
    waits.begin(first)
    assert (waits.settled(), waits.has_questions(), first.waits) == ([], False, True), "a Collector may still have it"
    clock.now += 1.0
    assert waits.settled() == [first]
    waits.begin(second)
    waits.asked([first], {OTLP: 5, OTHER: 0})
    assert (waits.settled(), len(waits)) == ([], 2)
    assert waits.translated({OTLP: 4, OTHER: 0}) == 0
    clock.now += 1.0
    waits.asked(waits.settled(), {OTLP: 9, OTHER: 2})
    assert waits.behind({OTLP: 4, OTHER: 0}) == 7
    assert waits.translated({OTLP: 6, OTHER: 0}) == 1
    waits.release(1, {REWARDS: 3})
    assert (first.waits, first.barrier, second.waits, len(waits)) == (False, {REWARDS: 3}, True, 1)
    assert waits.translated({OTLP: 9, OTHER: 2}) == 1
    waits.release(1, {REWARDS: 4})
    assert (second.barrier, len(waits), waits.has_questions()) == ({REWARDS: 4}, 0, False)


def test_nobody_waits_longer_than_the_bound_and_time_without_kafka_does_not_count() -> None:
    clock = Clock()
    waits = waits_by(clock)
    early, late = pending("a"), pending("b")
    waits.begin(early)
    clock.now += 6.0
    waits.begin(late)
    waits.asked([early], {OTLP: 5})
    clock.now += 100.0
    waits.away(99.0)
    assert waits.give_up() == []
    clock.now += 3.0
    assert waits.give_up() == [early]
    assert (early.waits, early.barrier, len(waits)) == (False, {}, 1)
    clock.now += 6.0
    assert waits.give_up() == [late]
    assert len(waits) == 0


def test_the_bound_holds_also_where_it_is_shorter_than_what_a_collector_takes() -> None:
    clock = Clock()
    waits = Waits(wait_seconds=10.0, settle_seconds=3600.0, clock=clock)
    waits.begin(found := pending("a"))
    clock.now += 9.0
    assert not waits.has_questions()
    clock.now += 1.0
    assert waits.has_questions(), "nobody is given up where nothing is asked"
    assert waits.give_up() == [found]


def test_who_begins_to_wait_while_kafka_is_away_does_not_wait_longer_for_it() -> None:
    """Read as it came back, before the first question was answered."""
    clock = Clock()
    waits = waits_by(clock)
    clock.now += 3600.0
    waits.begin(found := pending("a"))
    waits.away(3600.0)
    clock.now += 1.0
    assert waits.settled() == [found]
    clock.now += 9.0
    assert waits.give_up() == [found]


def test_without_a_translator_all_are_let_go() -> None:
    waits = waits_by(clock := Clock())
    found = [pending("a"), pending("b")]
    waits.begin(found[0])
    clock.now += 2.0
    waits.asked(waits.settled(), {OTLP: 5})
    waits.begin(found[1])
    waits.release_all()
    assert [one.waits for one in found] == [False, False]
    assert len(waits) == 0


@given(st.integers(0, 2**40), st.sets(st.integers(1, MAX_AHEAD)))
def test_what_overtook_is_known_again_after_a_restart_and_its_marks_are_small(emit_from: int, ahead: set[int]) -> None:
    part = RolloutsPartition(ROLLOUTS, emit_from, 0, 0)
    part.pending.append(pending("waits", emit_from))
    part.position = emit_from + MAX_AHEAD + 1
    for distance in sorted(ahead):
        assert may_overtake(emit_from + distance, emit_from)
        part.pending.append(one := pending(f"r{distance}", emit_from + distance))
        part.emitted(one)
    assert not may_overtake(emit_from + MAX_AHEAD + 1, emit_from)
    committed = part.commit_point()
    assert committed.offset == emit_from
    assert len(committed.metadata) < 2_500, "brokers take 4096, with the stamp of a transaction before it"
    again = RolloutsPartition.restored(ROLLOUTS, committed, 0)
    assert again.ahead == {emit_from + distance for distance in ahead}
    assert not again.is_emitted(emit_from)
    assert again.is_emitted(emit_from - 1)
    assert part.unsent == 1


def test_marks_of_the_version_before_and_broken_ones_are_understood() -> None:
    before = OffsetAndMetadata(5, '{"read_to":7,"replay_from":2}')
    assert RolloutsPartition.restored(ROLLOUTS, before, 0).ahead == set()
    broken = OffsetAndMetadata(5, '{"read_to":7,"replay_from":2,"ahead":"A"}')
    part = RolloutsPartition.restored(ROLLOUTS, broken, 1)
    assert (part.position, part.read_to, part.ahead) == (1, 5, set())


class OtlpWorld(World):
    """A world with a translator: some rewards are on otlp_spans first, and nobody is ever overdue."""

    def __init__(self, seed: int = 0, share: float = 1.0) -> None:
        self.chance = random.Random(seed + 1)
        self.share = share
        self.otlp: list[tuple[int, BaseModel]] = []
        self.translated = 0
        super().__init__()

    def restart(self) -> None:
        super().restart()
        self.assembly.waits = Waits(wait_seconds=1e9, settle_seconds=SETTLE_SECONDS, clock=lambda: self.now)
        self.assembly.waits.in_use = True

    def publish(self, topic: str, partition: int, event: BaseModel) -> tuple[TopicPartition, int]:
        if topic == "rewards" and self.chance.random() < self.share:
            self.otlp.append((partition, event))
            return TopicPartition(topic, partition), -1
        return super().publish(topic, partition, event)

    def translate(self) -> None:
        if self.translated < len(self.otlp):
            super().publish("rewards", *self.otlp[self.translated])
            self.translated += 1

    def pass_time(self) -> None:
        self.now += SETTLE_SECONDS

    def ask(self) -> None:
        waits = self.assembly.waits
        waits.asked(waits.settled(), {OTLP: len(self.otlp)})
        if complete := waits.translated({OTLP: self.translated}):
            waits.release(complete, {tp: len(self.logs[tp]) for tp in self.assembly.data if tp.topic == "rewards"})
        assert waits.give_up() == []

    def commit(self, *, limit: int = 100, crash: bool = False, meanwhile: Callable[[], None] = lambda: None) -> None:
        for _ in range(self.chance.randint(0, 3)):
            self.chance.choice([self.translate, self.ask, self.pass_time])()
        super().commit(limit=limit, crash=crash, meanwhile=meanwhile)

    def work(self, acts: int, crashes: float) -> None:
        """What is on the logs is read: run() mostly fills them."""
        for _ in range(acts):
            if self.chance.random() < crashes:
                self.commit(crash=self.chance.random() < 0.5)
                self.restart()
            elif self.chance.random() < 0.5:
                self.read(self.chance.choice(list(self.logs)), self.chance.randint(1, 4))
            else:
                self.commit(limit=self.chance.choice([1, 100]))

    def settle(self) -> None:
        self.work(self.chance.choice([0, 300]), crashes=0.05)
        parts = {**self.assembly.rollouts, **self.assembly.data}
        while self.translated < len(self.otlp) or any(parts[tp].position < len(self.logs[tp]) for tp in self.logs):
            self.work(10, crashes=0.0)
        while self.assembly.pending:
            self.commit()
        super().settle()


def ends_unrewarded(world: World, rollout_id: str, partition: int = 0) -> None:
    play(
        world,
        ("rollouts", partition, started(rollout_id)),
        ("spans", partition, llm_call(rollout_id, 1, [1], [2])),
        ("rollouts", partition, finished(rollout_id)),
    )


def read_all(world: World) -> None:
    for tp in world.logs:
        world.read(tp, len(world.logs[tp]))


def take(world: World) -> list[str]:
    """The rollouts that are emitted by a commit in which nobody asks anything."""
    before = len(world.trajectories)
    World.commit(world)
    return [trajectory.rollout_id for trajectory in world.trajectories[before:]]


def test_who_waits_keeps_nobody_else_waiting_and_a_restart_repeats_nobody() -> None:
    world = OtlpWorld()
    world.publish("rewards", 0, reward("waits", 0.5))
    ends_unrewarded(world, "waits")
    play(world, ("rollouts", 0, started("rewarded")))
    World.publish(world, "rewards", 0, reward("rewarded", 1.0))
    play(world, ("rollouts", 0, finished("rewarded")))
    play(world, ("rollouts", 0, started("failed")), ("rollouts", 0, finished("failed", status="failed")))
    read_all(world)
    assert take(world) == ["rewarded", "failed"]
    assert (world.assembly.pending, world.assembly.counts["otlp_waited"]) == (1, 1)
    world.restart()
    read_all(world)
    assert take(world) == [], "emitted before, or waiting again"
    world.now += 1.0
    world.ask()
    assert take(world) == []
    world.translate()
    world.ask()
    assert take(world) == [], "its reward is on the log, and not read"
    read_all(world)
    assert take(world) == ["waits"]
    assert world.trajectories[-1].reward == 0.5
    assert world.dead_letters == []


def test_all_begin_to_wait_at_once_also_where_there_is_no_room_to_overtake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would have the bound of those before it, and then its own."""
    monkeypatch.setattr(offsets_module, "MAX_AHEAD", 0)
    world = OtlpWorld(share=0.0)
    for number in range(3):
        ends_unrewarded(world, f"r{number}")
    play(world, ("rollouts", 0, started("failed")), ("rollouts", 0, finished("failed", status="failed")))
    read_all(world)
    assert take(world) == []
    assert len(world.assembly.waits) == 3
    world.now += SETTLE_SECONDS
    world.ask()
    assert take(world) == ["r0", "r1", "r2", "failed"]


def test_one_that_waits_for_its_rewards_to_be_read_lets_others_pass() -> None:
    world = OtlpWorld(share=0.0)
    ends_unrewarded(world, "waits")
    read_all(world)
    assert take(world) == []
    world.now += 1.0
    world.publish("rewards", 0, reward("other", 1.0))
    world.ask()
    play(world, ("rollouts", 1, started("next")), ("rollouts", 1, finished("next", status="failed")))
    play(world, ("rollouts", 0, started("behind")), ("rollouts", 0, finished("behind", status="failed")))
    for tp in world.assembly.rollouts:
        world.read(tp, 9)
    world.assembly.rollouts[ROLLOUTS].pending[-1].barrier = {}
    assert sorted(take(world)) == ["behind"]


def test_without_a_translator_nobody_waits() -> None:
    world = World()
    ends_unrewarded(world, "r")
    read_all(world)
    assert take(world) == ["r"]
    assert world.trajectories[0].partial == "no_reward"


def test_a_reward_of_another_name_or_attempt_is_not_the_one_that_is_waited_for() -> None:
    world = OtlpWorld(share=0.0)
    for rollout_id in ("a", "b"):
        play(world, ("rollouts", 0, started(rollout_id, 2)))
        given = reward("a", 1.0, attempt=2, name="style") if rollout_id == "a" else reward("b", 1.0, attempt=1)
        play(world, ("rewards", 0, given), ("rollouts", 0, finished(rollout_id, attempt=2)))
    read_all(world)
    assert take(world) == []
    assert len(world.assembly.waits) == 2


@given(st.integers(0, 2**32))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interleaving_and_crash_gives_each_rollout_once_with_its_reward(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # Small, so that the room for those that overtake is used up in many runs.
    monkeypatch.setattr(offsets_module, "MAX_AHEAD", (8, 16, 64, 0)[seed % 4])
    world = OtlpWorld(seed, share=(0.5, 0.8, 1.0)[seed % 3])
    lives, expected = run(seed, world)
    assert Counter(t.rollout_id for t in world.trajectories) == Counter(dict.fromkeys(expected, 1))
    assert {steps[-1][2].rollout_id for steps in lives if isinstance(steps[-1][2], RolloutFinished)} <= set(expected)
    for trajectory in world.trajectories:
        used = {span_id for sequence in trajectory.sequences for span_id in sequence.span_ids}
        used |= {found.reward_id for found in trajectory.rewards}
        assert expected[trajectory.rollout_id] <= used
    assert not world.assembly.open
    assert world.assembly.held_bytes == 0
    assert not any(part.pending or part.ahead for part in world.assembly.rollouts.values())

"""The assembler's state against a model of the log: any interleaving, any crash, everything exactly once."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, RolloutFinished, RolloutRequeued
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.assembler import assembly as assembly_module
from fulgurite.streams.assembler import offsets as offsets_module
from fulgurite.streams.assembler.assembly import Assembly
from fulgurite.streams.assembler.offsets import DataPartition, RolloutsPartition
from tests.streams.assembler_records import (
    attempt_finished,
    finished,
    llm_call,
    queued,
    reward,
    started,
    value,
)

PARTITIONS = 2
ORPHAN_SECONDS = 10.0
TOPICS = ("rollouts", "spans", "rewards")


class World:
    """Logs, committed offsets and outputs survive a crash; the assembly does not."""

    def __init__(self, *, max_held_bytes: int = 1 << 20, max_ended: int = 1_000) -> None:
        self.logs: dict[TopicPartition, list[bytes]] = {
            TopicPartition(topic, p): [] for topic in TOPICS for p in range(PARTITIONS)
        }
        self.committed: dict[TopicPartition, OffsetAndMetadata] = {}
        self.trajectories: list[Trajectory] = []
        self.dead_letters: list[DeadLetter] = []
        self.now = 0.0
        self.max_held_bytes = max_held_bytes
        self.max_ended = max_ended
        self.restart()

    def publish(self, topic: str, partition: int, event: BaseModel) -> tuple[TopicPartition, int]:
        tp = TopicPartition(topic, partition)
        self.logs[tp].append(value(event))
        return tp, len(self.logs[tp]) - 1

    def restart(self) -> None:
        parts = {
            topic: [
                (RolloutsPartition if topic == "rollouts" else DataPartition).restored(tp, self.committed.get(tp), 0)
                for tp in self.logs
                if tp.topic == topic
            ]
            for topic in TOPICS
        }
        self.assembly = Assembly(
            [part for part in parts["rollouts"] if isinstance(part, RolloutsPartition)],
            [part for part in parts["spans"] if isinstance(part, DataPartition)],
            [part for part in parts["rewards"] if isinstance(part, DataPartition)],
            max_open_rollouts=1_000,
            orphan_seconds=ORPHAN_SECONDS,
            max_held_bytes=self.max_held_bytes,
            max_ended=self.max_ended,
            clock=lambda: self.now,
        )
        for tp, part in self.assembly.rollouts.items():
            while part.replaying:
                self.read(tp, 1)

    def read(self, tp: TopicPartition, count: int) -> None:
        part = self.assembly.rollouts.get(tp) or self.assembly.data[tp]
        for offset in range(part.position, min(part.position + count, len(self.logs[tp]))):
            data = self.logs[tp][offset]
            if tp.topic == "rollouts":
                pending = self.assembly.lifecycle(tp, offset, decode_union(ROLLOUT_EVENT, "event", data))
                if pending is not None:
                    pending.barrier = {data_tp: len(self.logs[data_tp]) for data_tp in self.assembly.data}
            else:
                fields = json.loads(data)
                self.assembly.record(tp, offset, b"key", data, {fields["rollout_id"]: fields["attempt_id"]})

    def commit(self, *, limit: int = 100, crash: bool = False, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One transaction; with `crash` the process ends just before it is committed. `meanwhile`: what happens while
        records are read again."""
        if self.assembly.replaying:
            return
        ready = self.assembly.ready(limit)
        spilled = self.assembly.recall(ready)
        meanwhile()
        for held in spilled:
            if not held.done:
                self.assembly.read_again(held, self.logs[held.tp][held.offset])
        batch = self.assembly.take(ready)
        if batch is None or crash:
            return
        self.trajectories += batch.trajectories
        self.dead_letters += batch.dead_letters
        self.committed |= batch.offsets

    def expire(self) -> None:
        if any(part.position < len(self.logs[tp]) for tp, part in self.assembly.rollouts.items()):
            return
        while spilled := self.assembly.expire(self.now):
            for held in spilled:
                self.assembly.read_again(held, self.logs[held.tp][held.offset])

    def settle(self) -> None:
        """Reads everything, and commits until nothing is left to say."""
        for tp in self.logs:
            self.read(tp, len(self.logs[tp]))
        self.now += 2 * ORPHAN_SECONDS
        self.expire()
        self.commit()
        assert self.assembly.pending == 0
        assert self.assembly.held_bytes >= 0


Step = tuple[str, int, BaseModel]


def life(rollout_id: str, home: int, chance: random.Random) -> tuple[list[Step], set[str]]:
    """What one rollout's producers write, in order, and the ids its trajectory must hold."""
    if chance.random() < 0.15:  # nobody announces it
        return [("spans", home, llm_call(rollout_id, 1, [1], [2])), ("rewards", home, reward(rollout_id, 1.0))], set()
    steps: list[Step] = [("rollouts", home, queued(rollout_id))]
    attempts = chance.choice([1, 1, 2])
    ids: set[str] = set()
    for attempt in range(1, attempts + 1):
        steps.append(("rollouts", home, started(rollout_id, attempt)))
        for number in range(1, chance.randint(0, 3) + 1):
            span = llm_call(rollout_id, number, [number], [number], attempt=attempt)
            misrouted = chance.random() < 0.2
            steps.append(("spans", 1 - home if misrouted else home, span))
            if attempt == attempts:
                ids.add(span.span_id)
        if chance.random() < 0.7:
            given = reward(rollout_id, 1.0, attempt=attempt)
            steps.append(("rewards", home, given))
            if attempt == attempts:
                ids.add(given.reward_id)
        steps.append(("rollouts", home, attempt_finished(rollout_id, attempt)))
        if attempt < attempts:
            requeued = RolloutRequeued(rollout_id=rollout_id, attempt_id=f"{rollout_id}-{attempt}")
            steps.append(("rollouts", home, requeued))
    steps.append(("rollouts", home, finished(rollout_id, attempt=attempts)))
    if chance.random() < 0.1:
        steps.append(("rollouts", home, finished(rollout_id, attempt=attempts)))
    if chance.random() < 0.3:
        late = llm_call(rollout_id, 9, [1], [2], attempt=chance.randint(1, attempts))
        steps.append(("spans", home, late))
    return steps, ids


def run(seed: int, world: World) -> tuple[list[list[Step]], dict[str, set[str]]]:
    """A random interleaving of producers, readers, commits, crashes and time."""
    chance, aside = random.Random(seed), random.Random(seed)
    lives: list[list[Step]] = []
    expected: dict[str, set[str]] = {}
    for number in range(chance.randint(1, 12)):
        rollout_id = f"r{number}"
        steps, ids = life(rollout_id, number % PARTITIONS, chance)
        lives.append(steps)
        if steps[0][0] == "rollouts":
            expected[rollout_id] = ids
    waiting = [list(steps) for steps in lives]
    while any(waiting):
        act = chance.random()
        if act < 0.45:
            topic, partition, event = chance.choice([steps for steps in waiting if steps]).pop(0)
            world.publish(topic, partition, event)
        elif act < 0.75:
            world.read(chance.choice(list(world.logs)), chance.randint(1, 4))
        elif act < 0.9:
            world.commit(
                limit=chance.choice([1, 100]),
                meanwhile=lambda: world.read(aside.choice(list(world.logs)), aside.randint(0, 4)),
            )
        elif act < 0.94:
            world.now += chance.choice([1.0, ORPHAN_SECONDS])
            world.expire()
        else:
            world.commit(crash=chance.random() < 0.5)
            world.restart()
    world.settle()
    return lives, expected


@given(st.integers(0, 2**32))
@example(1036)  # more ends are read again than are remembered, before the records of the oldest
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interleaving_and_crash_gives_everything_exactly_once(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    # Small, so that rollouts are forgotten, spilled and held back in almost every run.
    monkeypatch.setattr(offsets_module, "RECENT_EVENTS", seed % 3)
    monkeypatch.setattr(assembly_module, "MAX_REPLAY_EVENTS", seed % 5)
    world = World(max_held_bytes=seed % 2 * 4_000, max_ended=1 + seed % 7 * 5)
    lives, expected = run(seed, world)

    emitted = Counter(trajectory.rollout_id for trajectory in world.trajectories)
    # A repeated `finished` may come after its rollout was forgotten: only with the tiny bounds of this test.
    ends = Counter(step[2].rollout_id for steps in lives for step in steps if isinstance(step[2], RolloutFinished))
    assert all(1 <= emitted[rollout_id] <= ends[rollout_id] for rollout_id in expected)
    assert set(emitted) == set(expected)
    used: dict[str, set[str]] = {}
    for trajectory in world.trajectories:
        ids = {span_id for sequence in trajectory.sequences for span_id in sequence.span_ids}
        used.setdefault(trajectory.rollout_id, set()).update(ids, {r.reward_id for r in trajectory.rewards})
    for rollout_id, ids in expected.items():
        # A late call that was read in time is used, too.
        assert ids <= used[rollout_id]
    dead = Counter((letter.topic, letter.partition, letter.offset) for letter in world.dead_letters)
    assert max(dead.values(), default=0) <= 1
    dead_ids: set[str] = set()
    for letter in world.dead_letters:
        assert letter.value == world.logs[TopicPartition(letter.topic, letter.partition)][letter.offset]
        fields = json.loads(letter.value or b"")
        dead_ids.add(fields.get("span_id") or fields["reward_id"])
    # One that is emitted anew, after it was forgotten, has what was late the first time.
    dead_ids &= {r for rollout_id, ids in used.items() if emitted[rollout_id] == 1 for r in ids}
    assert not dead_ids, "used and dead-lettered"
    unannounced = {
        f"{steps[0][2].rollout_id}-1-{suffix}"  # type: ignore[attr-defined]
        for steps in lives
        if steps[0][0] != "rollouts"
        for suffix in ("1", "r1")
    }
    reported = {
        fields.get("span_id") or fields["reward_id"]
        for fields in (json.loads(x.value or b"") for x in world.dead_letters if x.reason == "unknown_rollout")
    }
    assert unannounced <= reported


@given(st.integers(0, 2**32))
@hypothesis_settings(max_examples=150, deadline=None)
def test_with_the_real_bounds_no_rollout_is_emitted_twice_and_labels_survive(seed: int) -> None:
    world = World()
    _, expected = run(seed, world)
    assert Counter(t.rollout_id for t in world.trajectories) == Counter(dict.fromkeys(expected, 1))
    for trajectory in world.trajectories:
        assert trajectory.queued_ns == 7
        assert trajectory.metadata == {"label": trajectory.rollout_id}
    assert not world.assembly.open
    assert world.assembly.held_bytes == 0


def play(world: World, *steps: Step) -> None:
    for topic, partition, event in steps:
        world.publish(topic, partition, event)


def test_a_finished_rollout_waits_for_spans_that_were_not_read_yet() -> None:
    world = World()
    play(
        world,
        ("rollouts", 0, started("r")),
        ("spans", 0, llm_call("r", 1, [1], [2])),
        ("spans", 1, llm_call("r", 2, [1, 2], [3])),  # in a wrong partition
        ("rewards", 0, reward("r", 1.0)),
        ("rollouts", 0, finished("r")),
    )
    world.read(TopicPartition("rollouts", 0), 9)
    world.read(TopicPartition("spans", 0), 9)
    world.read(TopicPartition("rewards", 0), 9)
    world.commit()
    assert world.trajectories == []
    world.read(TopicPartition("spans", 1), 9)
    world.commit()
    assert [trajectory.calls for trajectory in world.trajectories] == [2]
    assert world.assembly.counts["misrouted"] > 0


@pytest.mark.parametrize("topic", ["spans", "rewards"])
def test_what_comes_while_spilled_records_are_read_again_is_in_the_trajectory_too(topic: str) -> None:
    world = World(max_held_bytes=10)
    play(world, ("rollouts", 0, started("r")), ("spans", 0, llm_call("r", 1, [1, 2], [3])))
    play(world, ("rollouts", 0, finished("r")))
    for tp in world.logs:
        world.read(tp, 9)
    late = llm_call("r", 2, [1, 2, 3, 4], [5]) if topic == "spans" else reward("r", 0.5)
    tp, _ = world.publish(topic, 0, late)
    world.commit(meanwhile=lambda: world.read(tp, 9))
    [trajectory] = world.trajectories
    assert (trajectory.calls, trajectory.reward) == ((2, None) if topic == "spans" else (1, 0.5))
    assert (world.assembly.held_bytes, world.dead_letters) == (0, [])


def test_late_records_and_their_superseded_siblings() -> None:
    world = World()
    play(world, ("rollouts", 0, started("r", 2)), ("rollouts", 0, finished("r", attempt=2)))
    world.settle()
    _, late = world.publish("spans", 0, llm_call("r", 1, [1], [2], attempt=2))
    world.publish("spans", 0, llm_call("r", 1, [1], [2], attempt=1))
    world.publish("rewards", 0, reward("r", 1.0, attempt=2))
    world.settle()
    assert [(x.topic, x.offset, x.reason) for x in world.dead_letters] == [
        ("spans", late, "late"),
        ("rewards", 0, "late"),
    ]
    assert world.dead_letters[0].value == world.logs[TopicPartition("spans", 0)][late]
    world.restart()
    world.settle()
    assert len(world.dead_letters) == 2


@pytest.mark.parametrize("reason", ["late", "unknown_rollout"])
def test_every_line_is_a_dead_letter_of_its_own_with_its_number(reason: str) -> None:
    world = World()
    if reason == "late":
        play(world, ("rollouts", 0, started("r", 1)), ("rollouts", 0, finished("r", attempt=1)))
        world.settle()
    lines = [value(llm_call("r", number, [1], [2], attempt=1)) for number in range(3)]
    record = b"\n".join([value(llm_call("other", 1, [1], [2])), lines[0], b"no json", b"", *lines[1:]])
    tp = TopicPartition("spans", 0)
    world.logs[tp].append(record)
    world.assembly.record(tp, 0, b"key", record, {"r": "attempt-r-1"} if reason == "unknown_rollout" else {"r": ""})
    held = world.assembly.unsent_bytes
    world.settle()
    assert [(x.reason, x.line, x.value) for x in world.dead_letters] == [
        (reason, number, line) for number, line in zip((1, 4, 5), lines, strict=True)
    ]
    assert world.assembly.unsent_bytes == 0
    assert reason != "late" or held > sum(map(len, lines)), "what goes with each letter counts, too"


def test_an_unknown_rollout_is_waited_for_and_then_given_up() -> None:
    world = World()
    world.publish("spans", 0, llm_call("ghost", 1, [1], [2]))
    world.publish("spans", 0, llm_call("slow", 1, [1], [2]))
    world.read(TopicPartition("spans", 0), 9)
    world.now += ORPHAN_SECONDS - 1
    world.expire()
    world.commit()
    assert world.dead_letters == []
    play(world, ("rollouts", 0, started("slow")))
    world.settle()
    assert [(x.reason, x.offset) for x in world.dead_letters] == [("unknown_rollout", 0)]
    play(world, ("rollouts", 0, finished("slow")))
    world.restart()
    world.settle()
    assert [trajectory.calls for trajectory in world.trajectories] == [1]
    assert len(world.dead_letters) == 1


def test_a_long_queue_holds_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly_module, "MAX_REPLAY_EVENTS", 10)
    monkeypatch.setattr(offsets_module, "RECENT_EVENTS", 5)
    world = World()
    play(world, ("rollouts", 0, queued("waits")), ("rollouts", 0, queued("runs")), ("rollouts", 0, started("runs")))
    for number in range(50):
        play(world, ("rollouts", 0, started(f"r{number}")), ("rollouts", 0, finished(f"r{number}")))
    world.settle()
    tp = TopicPartition("rollouts", 0)
    marks = json.loads(world.committed[tp].metadata)
    assert world.committed[tp].offset == len(world.logs[tp])
    assert marks["replay_from"] == 2  # the attempt that runs; the one in the queue is announced again when it starts
    assert set(world.assembly.open) == {"runs"}


def test_committed_spans_move_on_past_an_open_rollout_only_as_far_as_it_allows() -> None:
    world = World()
    play(world, ("rollouts", 0, started("old")), ("rollouts", 0, started("new")))
    world.publish("spans", 0, llm_call("done", 1, [1], [2]))
    play(world, ("rollouts", 0, started("done")), ("rollouts", 0, finished("done")))
    _, needed = world.publish("spans", 0, llm_call("old", 1, [1], [2]))
    world.publish("spans", 0, llm_call("new", 1, [1], [2]))
    world.settle()
    committed = world.committed[TopicPartition("spans", 0)]
    assert committed.offset == needed
    assert json.loads(committed.metadata) == {"read_to": 3, "unknown_from": 3}


def test_offsets_reset_by_an_operator_are_taken_as_they_are() -> None:
    tp = TopicPartition("spans", 0)
    part = DataPartition.restored(tp, OffsetAndMetadata(5, ""), 0)
    assert (part.position, part.read_to, part.unknown_from) == (5, 5, 5)
    events = RolloutsPartition.restored(tp, OffsetAndMetadata(5, "someone's note"), 2)
    assert (events.position, events.emit_from, events.read_to) == (2, 5, 5)


def test_a_dead_letter_behind_an_open_rollout_is_not_written_again_after_a_restart() -> None:
    world = World()
    play(world, ("rollouts", 0, started("old")))
    world.publish("spans", 0, llm_call("old", 1, [1], [2]))
    world.publish("spans", 0, llm_call("ghost", 1, [1], [2]))
    world.settle()
    world.restart()
    world.settle()
    play(world, ("rollouts", 0, finished("old")))
    world.settle()
    assert len(world.dead_letters) == 1
    assert [trajectory.calls for trajectory in world.trajectories] == [1]

"""The fold: what each event does to a rollout, what is void, what a half-written end leaves to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.consumers.coordinator import commands
from fulgurite.consumers.coordinator.state import FINAL, State
from fulgurite.schemas.coordinator import EnqueueRollout
from fulgurite.schemas.rollouts import (
    AttemptEnd,
    AttemptFinished,
    AttemptHeartbeat,
    AttemptStarted,
    RolloutCancelled,
    RolloutConfig,
    RolloutEvent,
    RolloutFinished,
    RolloutQueued,
    RolloutRequeued,
)

ENDS: tuple[AttemptEnd, ...] = ("succeeded", "failed", "timeout", "unresponsive")


def queued(rollout_id: str = "r1", time_ns: int = 1, **config: Any) -> RolloutQueued:
    return RolloutQueued(
        rollout_id=rollout_id, time_ns=time_ns, input={"q": 1}, group_id="g", config=RolloutConfig(**config)
    )


def started_state(**config: Any) -> tuple[State, AttemptStarted]:
    state = State(100)
    state.apply(queued(**config))
    start = commands.start_attempt(state.rollouts["r1"], "w1")
    assert state.apply(start) == "applied"
    return state, start


def snapshot(state: State) -> object:
    """Everything that may be asked of it."""
    return (
        {rollout_id: dataclasses.asdict(record) for rollout_id, record in state.rollouts.items()},
        state.queue.order(),
        dict(state.open_attempts),
        sorted(state.owed),
        {status: count for status, count in state.counts.items() if count},
    )


def apply_all(state: State, events: list[RolloutEvent]) -> list[str]:
    return [state.apply(event) for event in events]


def test_a_rollout_that_succeeds() -> None:
    state, start = started_state()
    assert len(state.queue) == 0
    assert state.open_attempts == {start.attempt_id: "r1"}
    end, last = commands.end_attempt(state.rollouts["r1"], "succeeded", "")
    assert apply_all(state, [end, last]) == ["applied", "applied"]
    record = state.rollouts["r1"]
    assert record.status == "succeeded"
    assert record.input is None
    assert not state.open_attempts
    assert isinstance(last, RolloutFinished)
    assert (last.attempt_id, last.attempts, last.attempt_status, last.group_id) == (
        start.attempt_id,
        1,
        "succeeded",
        "g",
    )


@pytest.mark.parametrize(
    ("end", "condition", "max_attempts", "successor"),
    [
        ("timeout", ["timeout"], 2, "requeued"),
        ("timeout", ["timeout"], 1, "finished"),
        ("timeout", ["unresponsive"], 3, "finished"),
        ("failed", ["failed"], 2, "requeued"),
        ("failed", ["timeout", "unresponsive"], 2, "finished"),
        ("unresponsive", ["unresponsive"], 2, "requeued"),
        ("succeeded", ["failed", "timeout", "unresponsive"], 5, "finished"),
    ],
)
def test_retry_rule(end: AttemptEnd, condition: list[Any], max_attempts: int, successor: str) -> None:
    state, _ = started_state(retry_condition=condition, max_attempts=max_attempts)
    events = commands.end_attempt(state.rollouts["r1"], end, "why")
    assert [event.event for event in events] == ["attempt_finished", successor]
    apply_all(state, events)
    expected = "requeuing" if successor == "requeued" else "succeeded" if end == "succeeded" else "failed"
    assert state.rollouts["r1"].status == expected


def test_retries_come_before_first_tries_and_these_in_the_order_of_their_time() -> None:
    state = State(100)
    for rollout_id, time_ns in (("c", 30), ("a", 10), ("b", 20)):
        state.apply(queued(rollout_id, time_ns))
    assert state.queue.order() == ["a", "b", "c"]
    state.apply(commands.start_attempt(state.rollouts["c"], "w"))
    apply_all(state, commands.end_attempt(state.rollouts["c"], "timeout", ""))
    assert state.queue.order() == ["c", "a", "b"]
    assert state.queue.take(2, {"a"}.__contains__) == ["c", "b"]
    assert state.queue.take(2, {"a"}.__contains__) == []
    state.queue.put_back("c")
    assert state.queue.take(5, set[str]().__contains__) == ["c", "a"]


def test_the_second_start_of_the_same_rollout_is_void() -> None:
    state = State(100)
    state.apply(queued())
    mine, theirs = (commands.start_attempt(state.rollouts["r1"], worker) for worker in ("w1", "w2"))
    assert apply_all(state, [mine, theirs]) == ["applied", "void"]
    assert [attempt.worker_id for attempt in state.rollouts["r1"].attempts] == ["w1"]


def test_duplicates_change_nothing() -> None:
    state, start = started_state()
    first = queued()
    end, requeue = commands.end_attempt(state.rollouts["r1"], "timeout", "")
    apply_all(state, [end, requeue])
    again = commands.start_attempt(state.rollouts["r1"], "w2")
    state.apply(again)
    before = snapshot(state)
    assert apply_all(state, [first, start, end, requeue, again]) == ["void"] * 5
    assert snapshot(state) == before


def test_what_comes_after_the_end_changes_nothing() -> None:
    state, start = started_state()
    apply_all(state, commands.cancel(state.rollouts["r1"], "enough"))
    before = snapshot(state)
    late: list[RolloutEvent] = [
        AttemptFinished(rollout_id="r1", attempt_id=start.attempt_id, status="succeeded"),
        RolloutFinished(rollout_id="r1", attempt_id=start.attempt_id, status="succeeded"),
        RolloutRequeued(rollout_id="r1", attempt_id=start.attempt_id),
        AttemptHeartbeat(rollout_id="r1", attempt_id=start.attempt_id),
        RolloutCancelled(rollout_id="r1"),
        queued(),
    ]
    assert apply_all(state, late) == ["void"] * 6
    assert snapshot(state) == before
    assert state.rollouts["r1"].status == "cancelled"
    assert state.rollouts["r1"].attempts[0].end == "cancelled"


def test_events_of_nobodys_rollout_are_unknown() -> None:
    assert State(10).apply(RolloutCancelled(rollout_id="nobody")) == "unknown"


def test_an_end_without_successor_is_owed_and_completed() -> None:
    state, _ = started_state()
    end, finished = commands.end_attempt(state.rollouts["r1"], "succeeded", "")
    state.apply(end)
    assert list(state.owed) == ["r1"]
    [completion] = commands.complete(state.rollouts["r1"])
    ignore = {"event_id", "time_ns"}
    assert completion.model_dump(exclude=ignore) == finished.model_dump(exclude=ignore)
    assert apply_all(state, [completion, finished]) == ["applied", "void"]
    assert not state.owed


def test_a_foreign_cancel_is_owed_an_end() -> None:
    state, start = started_state()
    state.apply(RolloutCancelled(rollout_id="r1", reason="stop"))
    assert list(state.owed) == ["r1"]
    events = commands.complete(state.rollouts["r1"])
    assert [event.event for event in events] == ["attempt_finished", "finished"]
    assert apply_all(state, events) == ["applied", "applied"]
    last = events[-1]
    assert isinstance(last, RolloutFinished)
    assert (last.status, last.attempt_id, last.error) == ("cancelled", start.attempt_id, "stop")


def test_a_retry_that_a_cancel_overtook_is_void() -> None:
    state, _ = started_state()
    end, requeue = commands.end_attempt(state.rollouts["r1"], "timeout", "")
    assert apply_all(state, [RolloutCancelled(rollout_id="r1"), end, requeue]) == ["applied", "applied", "void"]
    assert list(state.owed) == ["r1"]
    assert [event.event for event in commands.complete(state.rollouts["r1"])] == ["finished"]


def test_ended_rollouts_beyond_the_bound_are_forgotten_oldest_first_and_open_ones_never() -> None:
    state = State(max_ended=2)
    state.apply(queued("open", 0))
    for index, rollout_id in enumerate(("a", "b", "c")):
        state.apply(queued(rollout_id, index))
        state.apply(RolloutFinished(rollout_id=rollout_id, status="cancelled", time_ns=100 + index))
    assert set(state.rollouts) == {"open", "b", "c"}
    assert dict(state.counts) == {"queuing": 1, "cancelled": 2}


def test_resources_id_travels_as_a_field_that_the_event_does_not_know() -> None:
    [event] = commands.queue([EnqueueRollout(resources_id="res-1")])
    state = State(10)
    state.apply(RolloutQueued.model_validate_json(event.model_dump_json()))
    assert state.rollouts[event.rollout_id].resources_id == "res-1"


# Any interleaving of commands, foreign records and crashes: the log rebuilds the state, and the invariants hold.

STEP = st.tuples(
    st.sampled_from(
        ["queue", "start", "start_twice", "end", "half_end", "cancel", "foreign_cancel", "stale", "complete"]
    ),
    st.integers(0, 3),
    st.sampled_from(ENDS),
)


def events_of(step: str, state: State, rollout_id: str, end: AttemptEnd, log: list[RolloutEvent]) -> list[RolloutEvent]:
    record = state.rollouts.get(rollout_id)
    if step == "queue":
        return [queued(rollout_id, len(log), max_attempts=3, retry_condition=["timeout", "unresponsive"])]
    if step == "stale" and log:
        return [log[hash((rollout_id, len(log))) % len(log)]]
    if record is None or record.status in FINAL:
        return []
    if step in ("start", "start_twice") and record.is_queued:
        return [commands.start_attempt(record, f"w{n}") for n in range(1 if step == "start" else 2)]
    if step in ("end", "half_end") and record.open_attempt is not None:
        return commands.end_attempt(record, end, "")[: 1 if step == "half_end" else 2]
    if step == "cancel":
        return commands.cancel(record, "")
    if step == "foreign_cancel":
        return [RolloutCancelled(rollout_id=rollout_id)]
    if step == "complete" and record.owes_successor:
        return commands.complete(record)
    return []


def check_invariants(state: State) -> None:
    for record in state.rollouts.values():
        live = [attempt for attempt in record.attempts if attempt.end is None]
        assert len(live) <= 1
        assert all(state.open_attempts[attempt.attempt_id] == record.rollout_id for attempt in live)
        assert [attempt.sequence_id for attempt in record.attempts] == list(range(1, len(record.attempts) + 1))
        if record.status in FINAL:
            assert not live
        assert (record.rollout_id in state.owed) == record.owes_successor
        assert (record.rollout_id in state.queue.order()) == record.is_queued
    assert len(state.open_attempts) == sum(record.open_attempt is not None for record in state.rollouts.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=60), st.randoms(use_true_random=False))
def test_any_interleaving_is_rebuilt_from_the_log(steps: list[tuple[str, int, AttemptEnd]], random: Any) -> None:
    live, log = State(1_000), list[RolloutEvent]()
    finishes: dict[str, int] = {}
    for step, number, end in steps:
        for event in events_of(step, live, f"r{number}", end, log):
            log.append(event)
            if live.apply(event) == "applied" and event.event == "finished":
                finishes[event.rollout_id] = finishes.get(event.rollout_id, 0) + 1
        check_invariants(live)
    assert all(count == 1 for count in finishes.values())

    rebuilt = State(1_000)
    apply_all(rebuilt, [type(event).model_validate_json(event.model_dump_json()) for event in log])
    assert snapshot(rebuilt) == snapshot(live)

    # Partitions may be read in any interleaving, as long as each rollout's own order is kept.
    lanes = {f"r{n}": [event for event in log if event.rollout_id == f"r{n}"] for n in range(4)}
    shuffled = State(1_000)
    while pending := [lane for lane in lanes.values() if lane]:
        shuffled.apply(random.choice(pending).pop(0))
    assert snapshot(shuffled) == snapshot(live)

    # A restarted coordinator completes what was left half done, and then nothing is owed.
    for rollout_id in list(rebuilt.owed):
        apply_all(rebuilt, commands.complete(rebuilt.rollouts[rollout_id]))
    assert not rebuilt.owed
    check_invariants(rebuilt)

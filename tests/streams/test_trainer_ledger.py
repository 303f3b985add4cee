"""The ledger where one record has no room for it, and where rollouts are dropped for hours: each is named once."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fulgurite.schemas.codec import encode
from fulgurite.schemas.settings import KafkaSettings, Settings, SourceSettings, TrainerSettings
from fulgurite.schemas.training import DroppedRollout, RolloutsDecided, RunFinished, RunStarted, TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import asking, ledger, serve
from fulgurite.streams.trainer.ledger import LedgerEvent, in_parts, is_full, passes_over, restore, take_over, whole
from fulgurite.streams.trainer.log import committed_run
from fulgurite.streams.trainer.publishing import Publishing
from fulgurite.streams.trainer.windows import MOST_STRANGERS, Member, Shape, Windows
from tests.streams.trainer_world import World, all_once, build_model, training_events

SHAPE = Shape(run_id="r", group_size=2, groups_per_step=2, groups_ahead=4, max_staleness=2, group_deadline_seconds=10.0)


def member(group: int, index: int, reason: str = "", reward: float = 0.0) -> Member:
    name = f"r-g{group}"
    given = Trajectory(rollout_id=f"{name}-r{index}", run_id="r", group_id=name, status="succeeded", reward=reward)
    return Member(given, reason)


def dropped(count: int, reason: str = "failed") -> list[DroppedRollout]:
    return [DroppedRollout(rollout_id=f"r-g{number}-r0", reason=reason) for number in range(count)]


EVENTS: list[LedgerEvent] = [
    TrainingStep(
        event_id="r-step3", run_id="r", step=3, resource="policy", version_in=7, version_out=8, offsets={"0": 4},
        rollout_ids=[f"r-g{number}-r1" for number in range(40)], again=["r-g0-r9"], dropped=dropped(70, "grün: 1.0"),
        metrics={"a": 1.0},
    ),
    RunFinished(event_id="r-finished", run_id="r", resource="policy", version=7, dropped=dropped(90), reason="over"),
    RolloutsDecided(
        event_id="x", run_id="r", step=3, resource="policy", version_in=7, version_out=7, dropped=dropped(90),
        offsets={"0": 4},
    ),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
@pytest.mark.parametrize("max_bytes", [900, 2000, 1 << 20])
def test_a_record_in_parts_is_the_same_record(event: LedgerEvent, max_bytes: int) -> None:
    *parts, last = in_parts(event, max_bytes)
    assert bool(parts) == (max_bytes < 1 << 20)
    for each in (*parts, last):
        encode(each, max_bytes)
    assert type(last) is type(event)
    told: list[RolloutsDecided] = [part for part in parts if isinstance(part, RolloutsDecided)]
    assert len(told) == len(parts)
    assert {part.part_of for part in told} <= {event.event_id}
    assert len({part.event_id for part in told}) == len(told)
    assert whole(last, told) == event


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["", "failed", "late"]), min_size=2, max_size=2), max_size=8), st.data())
def test_a_life_after_goes_on_behind_what_was_named(groups: list[list[str]], data: st.DataObject) -> None:
    """Whatever of its records it reads again, in whichever order, and whatever its clock makes of a group."""
    before = Windows(SHAPE, asked=len(groups))
    records = [(g, i) for g, reasons in enumerate(groups) for i, reason in enumerate(reasons) if reason != "late"]

    def read(windows: Windows, order: list[tuple[int, int]]) -> None:
        for g, i in order:
            windows.add(member(g, i, groups[g][i], reward=float(i)), 0)

    first = copy.deepcopy(before)
    read(first, records)
    if data.draw(st.booleans()):
        first.close(first.deadline_due(10**12))
    window = first.take(0)
    named = [] if window else take_over(first)

    second = copy.deepcopy(before)
    restore(second, named, by_rollout=False)
    read(second, data.draw(st.permutations(records)))
    found = [each.rollout_id for each in named]
    while window := second.take(0):
        found += [each.rollout_id for each in window.dropped]
        found += [each.trajectory.rollout_id for group in window.groups for each in group]
    found += [each.rollout_id for each in second.end()]
    assert sorted(found) == [f"r-g{g}-r{i}" for g in range(len(groups)) for i in range(2)]


def test_what_waits_with_its_group_is_not_named_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MOST_UNNAMED", 3)
    shape = Shape("r", 3, 2, 4, 2, 10.0)
    windows = Windows(shape, asked=4)
    for index in range(3):
        windows.add(member(0, index, "failed"), 0)
        windows.add(member(1, index), 0) if index else None
    windows.close(windows.deadline_due(10**12))
    assert windows.take(0) is None
    assert is_full(windows)
    assert {each.rollout_id for each in take_over(windows)} == {f"r-g0-r{index}" for index in range(3)}
    assert [each.rollout_id for each in windows.dropped] == ["r-g1-r0"]
    assert not is_full(windows), "what is held back does not fill it again"
    for index in range(3):
        windows.add(member(2, index), 0)
    window = windows.take(0)
    assert window
    assert (window.named, [each.rollout_id for each in window.dropped]) == ({"failed": 3}, ["r-g1-r0"])
    assert not windows.named


def test_groups_that_were_named_are_replaced_and_counted_once() -> None:
    windows = Windows(SHAPE, asked=2)
    gone = [*dropped(1, "zero_variance"), DroppedRollout(rollout_id="r-g0-r1", reason="deadline")]
    far = DroppedRollout(rollout_id="r-g5-r0", reason="failed: 3")
    restore(windows, [*gone, far, DroppedRollout(rollout_id="who", reason="not_asked")], by_rollout=False)
    assert (windows.groups_settled, windows.refilled, windows.asked) == (2, 1, 6)
    assert windows.named == {"zero_variance": 1, "deadline": 1, "failed": 1, "not_asked": 1}
    assert windows.outstanding() == ["r-g0-r1", *(f"r-g{g}-r{i}" for g in range(1, 5) for i in range(2))]
    windows.add(member(0, 1), 0)
    windows.add(Member(Trajectory(rollout_id="who", run_id="r", status="failed")), 0)
    assert (windows.late, windows.duplicates, windows.dropped) == (1, 1, [])


def test_strangers_that_were_named_early_are_remembered_until_the_next_window() -> None:
    windows = Windows(SHAPE, asked=4)

    def come() -> None:
        for number in range(MOST_STRANGERS + 9):
            windows.add(Member(Trajectory(rollout_id=f"s{number}", run_id="r", status="failed")), 0)
            if is_full(windows):
                take_over(windows)

    come()
    assert len(windows.dropped) == 9
    come()
    assert len(windows.dropped) == 9
    for group in range(2):
        for index in range(2):
            windows.add(member(group, index), 0)
    assert windows.take(0)
    assert len(windows.strangers) == MOST_STRANGERS


def test_a_selections_groups_are_told_by_their_rollouts() -> None:
    windows = Windows(replace(SHAPE, replayed=True))
    restore(windows, [DroppedRollout(rollout_id=name, reason="zero_variance") for name in "ab"], by_rollout=True)
    assert not passes_over(windows, 0, ["a", "c"])
    assert not passes_over(windows, 0, [])
    assert passes_over(windows, 0, ["b", "a"])
    assert (windows.refilled, windows.passed, windows.is_settled(0), windows.asked) == (1, {}, True, 0)


FAILING = 48


@pytest.fixture
def live(kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(asking, "REPLACE_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(ledger, "MOST_UNNAMED", 12)
    trainer = TrainerSettings(
        run_id="live", model=build_model(tmp_path / "model", 3), output=tmp_path / "policy", steps=2, groups_per_step=2,
        group_size=4, zero_variance="keep", tasks="tests.streams.trainer_world:bandit", keep_versions=9,
        pacing_staleness=0,
    )  # fmt: skip
    # A step's own record is 5 to 6 KiB, all metrics and no rollouts.
    return Settings(kafka=kafka_settings.model_copy(update={"max_record_bytes": 7 << 10}), trainer=trainer)


async def run(settings: Settings) -> None:
    async with asyncio.timeout(60):
        await serve(settings, asyncio.Event())


def weights(settings: Settings) -> list[bytes]:
    folder = settings.trainer.output / settings.trainer.run_id
    return [path.read_bytes() for path in sorted(folder.glob("v*/weights/model.safetensors"))]


async def test_agents_that_fail_for_long_end_no_run_and_no_rollout_is_named_twice(
    live: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A life dies before it has named any, the next one behind its first such record. And a shadow sees it all."""
    answered: list[str] = []
    groups: dict[str, int] = {}

    def alter(trajectory: Trajectory) -> Trajectory:
        answered.append(trajectory.rollout_id)
        if (
            groups.setdefault(trajectory.group_id, len(groups)) >= FAILING // 4
        ):  # whole ones, in whatever order they come
            return trajectory
        return trajectory.model_copy(update={"status": "failed", "sequences": [], "reward": None})

    more, deaths = Publishing.more, iter(["before", "after"])

    async def die(self: Publishing, *arguments: Any) -> None:
        death = next(deaths, "") if isinstance(arguments[-1], RolloutsDecided) else ""
        if death == "before":
            raise RuntimeError("killed before")
        await more(self, *arguments)
        if death == "after":
            raise RuntimeError("killed after")

    monkeypatch.setattr(Publishing, "more", die)
    async with World(live.kafka, alter).running() as world:
        for death in ("before", "after"):
            with pytest.raises(RuntimeError, match=f"killed {death}"):
                await run(live)
        committed = await committed_run(live.kafka, "live")
        assert committed
        assert len(committed.named) >= 12
        await run(live)
    events = await training_events(live.kafka, "live")
    fates = all_once(events)
    assert set(fates) == set(world.queued) == set(answered)
    assert sorted(fates.values()) == ["failed"] * FAILING + ["trained"] * 16
    assert sum(isinstance(event, RunStarted) for event in events) == 3
    early = [event for event in events if isinstance(event, RolloutsDecided) and not event.part_of]
    assert len(early) >= 3
    assert all(event.offsets and event.version_out == 1 for event in early)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert steps[0].metrics["rollouts/dropped/failed"] == steps[0].metrics["rollouts/dropped"] == FAILING

    own = TrainerSettings(run_id="shadow", resource="shadow", output=live.trainer.output)
    shadow = live.model_copy(update={"trainer": own, "source": SourceSettings(run_id="live")})
    await run(shadow)
    assert weights(shadow) == weights(live)
    told = await training_events(live.kafka, "shadow")
    assert all_once(told) == fates
    assert any(isinstance(event, RolloutsDecided) for event in told)


async def test_a_window_larger_than_a_record_is_told_in_parts(live: Settings) -> None:
    """By the live run, and by a shadow that puts them together again."""
    wide = live.trainer.model_copy(update={"group_size": 40, "steps": 1, "run_id": "live" * 15})
    live = live.model_copy(update={"trainer": wide})
    async with World(live.kafka).running() as world:
        await run(live)
    events = await training_events(live.kafka, wide.run_id)
    assert any(isinstance(event, RolloutsDecided) and event.part_of for event in events)
    assert all_once(events) == dict.fromkeys(world.queued, "trained")
    own = TrainerSettings(run_id="shadow", resource="shadow", output=live.trainer.output)
    shadow = live.model_copy(update={"trainer": own, "source": SourceSettings(run_id=wide.run_id)})
    await run(shadow)
    assert weights(shadow) == weights(live)
    assert all_once(await training_events(live.kafka, "shadow")) == all_once(events)

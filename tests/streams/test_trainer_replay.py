"""Trainers on another run's rollouts, against the real broker: beside the live one, afterwards, in part, and again."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
import torch
from aiokafka import TopicPartition
from transformers import AutoModelForCausalLM

from fulgurite.schemas.codec import encode
from fulgurite.schemas.errors import Fenced, SettingsError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.migrations import connection_options
from fulgurite.schemas.settings import (
    ClickHouseSettings,
    KafkaSettings,
    Settings,
    SourceSettings,
    TrainerSettings,
    to_environment,
)
from fulgurite.schemas.topics import RESOURCES, TRAJECTORIES
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingStep
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.trainer import selection, serve
from fulgurite.streams.trainer.plan import OF_ASKING, make_plan
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.source import adopt
from tests.streams.test_trainer_metrics import free_port
from tests.streams.trainer_world import (
    World,
    all_once,
    build_model,
    load_one_at_a_time,
    read_topic,
    sample,
    training_events,
)

STEPS = 4


@pytest.fixture(scope="session")
def start_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("start") / "model", seed=5)


@pytest.fixture(autouse=True)
def one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    load_one_at_a_time(monkeypatch)


@pytest.fixture
def live(kafka_settings: KafkaSettings, start_model: Path, tmp_path: Path) -> Settings:
    trainer = TrainerSettings(
        run_id="live",
        model=start_model,
        output=tmp_path / "live",
        tasks="tests.streams.trainer_world:bandit",
        steps=STEPS,
        groups_per_step=3,
        group_size=4,
        pacing_staleness=1,
        learning_rate=1e-2,
        warmup_steps=2,
        keep_versions=STEPS + 1,
    )
    return Settings(kafka=kafka_settings, trainer=trainer)


def replay_of(live: Settings, name: str, source: dict[str, Any] | None = None, **trainer: Any) -> Settings:
    """Nothing but what is said here is set: the rest comes from the source run's record."""
    assert live.trainer.output
    own = TrainerSettings(run_id=name, resource=f"policy-{name}", output=live.trainer.output.parent / name, **trainer)
    return live.model_copy(update={"trainer": own, "source": SourceSettings(run_id="live", **(source or {}))})


async def run(settings: Settings) -> None:
    async with asyncio.timeout(60):
        await serve(settings, asyncio.Event())


async def until_started(settings: Settings) -> None:
    while True:
        if await training_events(settings.kafka, settings.trainer.run_id):
            return
        await asyncio.sleep(0.05)


def some_fail(trajectory: Trajectory) -> Trajectory:
    if trajectory.rollout_id.endswith("2-r1"):
        return trajectory.model_copy(update={"status": "failed", "sequences": [], "reward": None})
    return trajectory


def weights(settings: Settings) -> list[bytes]:
    """Of every version, oldest first."""
    folder = settings.trainer.output / settings.trainer.run_id
    return [path.read_bytes() for path in sorted(folder.glob("v*/weights/model.safetensors"))]


async def steps_of(settings: Settings) -> list[TrainingStep]:
    events = await training_events(settings.kafka, settings.trainer.run_id)
    return [event for event in events if isinstance(event, TrainingStep)]


def what(steps: list[TrainingStep]) -> list[tuple[Any, ...]]:
    return [(s.step, s.rollout_ids, s.groups, s.staleness_mean, s.staleness_max, s.reward_mean) for s in steps]


async def test_a_shadow_with_the_same_settings_becomes_the_live_run_bit_for_bit(live: Settings) -> None:
    """Beside it, at the same time; with another loss it becomes something else from the same rollouts."""
    same, other = replay_of(live, "same"), replay_of(live, "other", loss="gspo")
    async with World(live.kafka, some_fail).running() as world:
        running = asyncio.create_task(run(live))
        await until_started(live)
        await asyncio.gather(running, run(same), run(other))
    expected = weights(live)
    assert len(expected) == STEPS + 1
    assert weights(same) == expected, "not the same bits"
    assert weights(other)[0] == expected[0]
    assert weights(other)[-1] != expected[-1]

    steps = await steps_of(live)
    assert max(step.staleness_max for step in steps) == 1
    for shadow in (same, other):
        events = await training_events(live.kafka, shadow.trainer.run_id)
        assert [type(events[0]), type(events[-1])] == [RunStarted, RunFinished]
        assert what(await steps_of(shadow)) == what(steps)
        assert all_once(events).items() <= all_once(await training_events(live.kafka, "live")).items()
        assert events[0].config["source"]["run_id"] == "live"  # pyright: ignore[reportAttributeAccessIssue]
    assert (await steps_of(other))[-1].metrics["sampling/same_version_tokens"] == 0.0
    assert {rollout.partition("-")[0] for rollout in world.queued} == {"live"}, "a shadow asks for nothing"
    announced = await read_topic(live.kafka, RESOURCES)
    assert {record.key for record in announced} == {b"policy", b"policy-same", b"policy-other"}


async def test_a_finished_run_replayed_twice_and_once_interrupted_gives_the_same_bits(live: Settings) -> None:
    async with World(live.kafka, some_fail).running():
        await run(live)
    once, again = (replay_of(live, name, loss="dr_grpo", length_constant=3, groups_per_step=2) for name in ("a", "b"))
    await run(once)
    stop = asyncio.Event()
    running = asyncio.create_task(serve(again, stop))
    while True:
        if await steps_of(again):
            break
        await asyncio.sleep(0.05)
    stop.set()
    await running
    await run(again)
    await run(again)  # it is over: nothing happens
    assert weights(once) == weights(again)
    steps = await steps_of(once)
    assert len(steps) == STEPS, "trainer.steps is the source's where it is not set"
    assert what(steps) == what(await steps_of(again))
    assert [event.loss for event in steps] == [event.loss for event in await steps_of(again)]
    fates = all_once(await training_events(live.kafka, "a"))
    assert set(fates) == {f"live-g{group}-r{member}" for group in range(3 * STEPS) for member in range(4)}
    assert [fates[f"live-g{group}-r0"] for group in range(8, 12)] == ["run_ended"] * 4, "8 groups make 4 windows of 2"


async def test_a_replay_of_all_there_is_ends_with_it(live: Settings) -> None:
    async with World(live.kafka).running():
        await run(live)
    settings = replay_of(live, "long", steps=50, groups_per_step=5)
    await run(settings)
    finished = (await training_events(live.kafka, "long"))[-1]
    assert isinstance(finished, RunFinished)
    assert (finished.step, finished.reason) == (2, "its source is over; 2 steps done")
    assert {each.reason for each in finished.dropped} == {"run_ended"}
    assert len(finished.dropped) == 8


async def test_a_replay_need_not_wait_for_a_source_that_has_stopped(live: Settings) -> None:
    stop = asyncio.Event()
    async with World(live.kafka).running():
        running = asyncio.create_task(serve(live, stop))
        while True:
            if len(await steps_of(live)) >= 2:
                break
            await asyncio.sleep(0.05)
        stop.set()
        await running
    done = len(await steps_of(live))
    settings = replay_of(live, "short", {"follow": False}, steps=50)
    await run(settings)
    assert what(await steps_of(settings)) == what(await steps_of(live))
    finished = (await training_events(live.kafka, "short"))[-1]
    assert isinstance(finished, RunFinished)
    assert finished.step == done


async def test_a_time_without_an_offset_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Client:
        async def offsets_for_times(self, wanted: dict[TopicPartition, int]) -> dict[TopicPartition, None]:
            asked.extend(wanted.values())
            return dict.fromkeys(wanted)

        async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
            return dict.fromkeys(partitions, 0)

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    reader = TrajectoryReader(KafkaSettings(), "trajectories")
    reader._consumer = Client()  # type: ignore[assignment]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    reader.partitions = [TopicPartition("trajectories", 0)]
    monkeypatch.setattr(reader, "first_offsets", lambda: asyncio.sleep(0, {}))
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        await reader.seek_to_begin(SourceSettings.model_validate({"begin": "time", "time": "2026-11-22T08:00"}))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert datetime.fromtimestamp(asked[0] / 1000, UTC) == datetime(2026, 11, 22, 8, tzinfo=UTC)


async def test_a_replay_from_an_offset_or_a_time_begins_with_the_first_whole_group(live: Settings) -> None:
    live = live.model_copy(update={"trainer": live.trainer.model_copy(update={"pacing_staleness": 0})})
    async with World(live.kafka).running():
        await run(live)
    steps = await steps_of(live)
    replays = [replay_of(live, "from-offset", {"begin": "offset", "offsets": steps[1].offsets})]
    records = await read_topic(live.kafka, TRAJECTORIES)
    first = min(r.timestamp for r in records if r.offset >= steps[1].offsets[str(r.partition)])
    time = datetime.fromtimestamp(first / 1000, UTC)
    replays.append(replay_of(live, "from-time", {"begin": "time", "time": time}))
    for replay in replays:
        await run(replay)
        events = await training_events(live.kafka, replay.trainer.run_id)
        assert [s.rollout_ids for s in await steps_of(replay)] == [s.rollout_ids for s in steps[2:]]
        fates = all_once(events)
        assert all(fates[rollout_id] == "trained" for step in steps[2:] for rollout_id in step.rollout_ids)


async def materialised(settings: Settings) -> None:
    """The rows that the materialiser makes of `trajectories`."""
    options = connection_options(settings.clickhouse)
    with clickhouse_connect.get_client(**options, database=settings.clickhouse.database) as client:
        rows = [
            [r.value, r.key, {}, r.topic, r.partition, r.offset, datetime.fromtimestamp(r.timestamp / 1000, UTC)]
            for r in await read_topic(settings.kafka, TRAJECTORIES)
        ]
        held_out = Trajectory(rollout_id="held-out", mode="val", status="succeeded", reward=1.0)
        rows.append([encode(held_out), b"held-out", {}, rows[0][3], 0, 10**6, rows[0][6]])
        names = ["raw", "key", "headers", "_topic", "_partition", "_offset", "_ts"]
        client.insert("in_trajectories", rows, names)


async def test_a_query_says_which_rollouts_and_in_which_order(
    live: Settings, migrated_settings: ClickHouseSettings
) -> None:
    live = live.model_copy(update={"clickhouse": migrated_settings})
    async with World(live.kafka, some_fail).running():
        await run(live)
    await materialised(live)
    sql = (
        "SELECT rollout_id FROM trajectories WHERE run_id = 'live' AND NOT endsWith(rollout_id, 'r3') "
        "ORDER BY toUInt32(extract(group_id, '[0-9]+$')) DESC, rollout_id"
    )
    replays = [replay_of(live, name, {"begin": "sql", "sql": sql}, loss="rloo") for name in ("a", "b")]
    for replay in replays:
        await run(replay)
    assert weights(replays[0]) == weights(replays[1])
    steps = await steps_of(replays[0])
    assert len(steps) == STEPS
    assert max(step.staleness_max for step in steps) == 0, "all tokens of a group here are of one version"
    named = [{*step.rollout_ids, *(each.rollout_id for each in step.dropped)} for step in steps]
    assert named == [
        {f"live-g{group}-r{member}" for group in range(first, first - 3, -1) for member in range(3)}
        for first in (11, 8, 5, 2)
    ]
    fates = all_once(await training_events(live.kafka, "a"))
    assert (fates["live-g2-r1"], fates["live-g2-r0"] != "failed") == ("failed", True)

    for wrong, message in (
        ("SELECT rollout FROM trajectories", "source.sql: .*rollout"),
        ("SELECT run_id FROM trajectories", "gives run_id; a column rollout_id is needed"),
        ("SELECT 'nobody' AS rollout_id", "selects 1 rollouts; 1 have no trajectory"),
        ("SELECT 'held-out' AS rollout_id", "selects 1 rollouts that were not asked for to be trained on"),
    ):
        with pytest.raises(SettingsError, match=message):
            await run(replay_of(live, "wrong", {"begin": "sql", "sql": wrong}))


async def test_a_start_whose_query_took_until_it_was_overtaken_changes_nothing_of_the_runs_selection(
    live: Settings, migrated_settings: ClickHouseSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live.model_copy(update={"clickhouse": migrated_settings})
    async with World(live.kafka).running():
        await run(live)
    await materialised(live)
    keep, sleeps, asleep, woken = selection.keep, iter([True]), threading.Event(), threading.Event()

    def sleepily(*arguments: Any) -> Any:
        if next(sleeps, False):
            asleep.set()
            woken.wait(60)
        return keep(*arguments)

    monkeypatch.setattr(selection, "keep", sleepily)
    sql = "SELECT rollout_id FROM trajectories WHERE run_id = 'live' ORDER BY rand()"
    replay = replay_of(live, "anyhow", {"begin": "sql", "sql": sql}, zero_variance="keep")
    first, stop = asyncio.create_task(run(replay)), asyncio.Event()
    await asyncio.to_thread(asleep.wait, 60)
    second = asyncio.create_task(serve(replay, stop))
    while len(await steps_of(replay)) < STEPS // 2:  # noqa: ASYNC110 (topics tell nobody)
        await asyncio.sleep(0.02)
    stop.set()
    await second
    woken.set()
    with pytest.raises(Fenced):
        await first
    await run(replay)
    steps = await steps_of(replay)
    assert len(steps) == STEPS
    assert len(all_once(await training_events(live.kafka, "anyhow"))) == STEPS * 3 * 4


async def test_two_policies_that_act_in_the_same_rollouts_have_a_trainer_each(live: Settings, tmp_path: Path) -> None:
    """The critic's trainer follows the one that asks for the rollouts; the versions it sees are its own."""
    folder = build_model(tmp_path / "critic-model", seed=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def criticised(trajectory: Trajectory) -> Trajectory:
        tokens, logprobs = sample(model, [3, 4], zlib.crc32(trajectory.rollout_id.encode()))
        own = TokenSequence(
            token_ids=tokens,
            loss_mask=[0, 0] + [1] * (len(tokens) - 2),
            logprobs=logprobs,
            weight_versions=[VersionSpan(version=1, start=2, end=len(tokens))],
            resource="critic",
            agent="critic",
        )
        return trajectory.model_copy(update={"sequences": [*trajectory.sequences, own]})

    live = live.model_copy(update={"trainer": live.trainer.model_copy(update={"steps": 2})})
    trainer = TrainerSettings(
        run_id="critic", resource="critic", model=folder, output=tmp_path, agents=["critic"], max_staleness=0, steps=2,
    )  # fmt: skip
    critic = live.model_copy(
        update={"trainer": trainer, "source": SourceSettings(run_id="live", resource="critic", begin="beginning")}
    )
    async with World(live.kafka, criticised).running():
        await run(live)
    await run(critic)
    (first,) = await steps_of(critic)
    assert first.metrics["sampling/same_version_tokens"] > 0, (
        "trainer and sampler are compared: the versions are its own"
    )
    assert first.staleness_max == 0
    finished = (await training_events(live.kafka, "critic"))[-1]
    assert isinstance(finished, RunFinished)
    assert finished.reason == "its source is over; 1 steps done"
    fates = all_once(await training_events(live.kafka, "critic"))
    assert {fates[f"live-g{group}-r0"] for group in (3, 4, 5)} == {"stale"}, "version 1 sampled them, 2 is trained"
    # Another policy on the same tokens: what the ledger counts are versions of neither.
    shadow = trainer.model_copy(update={"run_id": "critic-shadow", "resource": "critic-shadow"})
    await run(critic.model_copy(update={"trainer": shadow}))
    assert len(await steps_of(critic.model_copy(update={"trainer": shadow}))) == 2


async def test_the_command_needs_only_the_name_of_the_run(live: Settings, tmp_path: Path) -> None:
    trainer = live.trainer.model_copy(update={"steps": 2, "tasks": "tests.streams.trainer_world:bandit"})
    async with World(live.kafka).running():
        await run(live.model_copy(update={"trainer": trainer}))
    command = ["train", "--shadow", "live", "--set", "trainer.loss=cispo", "--set", f"trainer.output={tmp_path}"]
    environment = to_environment({"kafka": live.kafka.model_dump(exclude_defaults=True)})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fulgurite.infra", *command, env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    _, stderr = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, stderr.decode()
    assert "settings other than by default: trainer.run_id = live-shadow, trainer.resource = live-shadow" in str(stderr)
    events = await training_events(live.kafka, "live-shadow")
    assert isinstance(events[0], RunStarted)
    assert (events[0].config["loss"], events[0].config["groups_per_step"]) == ("cispo", 3)
    assert [type(event) for event in events[1:]] == [TrainingStep, TrainingStep, RunFinished]


async def test_settings_of_the_source_may_have_no_effect_in_a_shadow_its_own_may_not(live: Settings) -> None:
    """Nor is the source's port taken."""
    changes = {"steps": 1, "clip_high": 0.3, "metrics_port": free_port()}
    async with World(live.kafka).running():
        await run(live.model_copy(update={"trainer": live.trainer.model_copy(update=changes)}))
    plan = make_plan(await adopt(replay_of(live, "weighed", correction="truncate")))
    assert (plan.trainer.clip_high, plan.trainer.metrics_port) == (0.3, 0)
    with pytest.raises(SettingsError, match=r"trainer\.clip_high has no effect"):
        make_plan(await adopt(replay_of(live, "weighed", correction="truncate", clip_high=0.4)))


async def test_what_cannot_be_replayed_says_so_at_once(live: Settings) -> None:
    with pytest.raises(SettingsError, match="knows no such run"):
        await run(replay_of(live, "early"))
    async with World(live.kafka).running():
        await run(live.model_copy(update={"trainer": live.trainer.model_copy(update={"steps": 1})}))
    thief = live.trainer.model_copy(update={"run_id": "thief"})
    wrong: list[tuple[Settings, str]] = [
        (
            live.model_copy(update={"trainer": thief, "source": SourceSettings(run_id="live", resource="critic")}),
            "trainer.resource = policy is what the source run live makes versions of",
        ),
        (replay_of(live, "live"), "is the source run itself"),
        (replay_of(live, "x", {"begin": "offset"}), "source.offsets is empty, but source.begin is offset"),
        (replay_of(live, "x", {"sql": "SELECT 1"}), "source.sql has no effect: source.begin is beginning"),
        (replay_of(live, "x", {"begin": "offset", "offsets": {"7": 1}}), "has no partition 7; it has 0, 1"),
        (
            live.model_copy(update={"trainer": TrainerSettings(run_id="x"), "source": SourceSettings(run_id="live")}),
            "trainer.resource = policy is what the source run live makes versions of",
        ),
        (live.model_copy(update={"source": SourceSettings(follow=False)}), "source.follow has no effect"),
        (replay_of(live, "x", group_size=2), "group_size = 2, but the source run live asked for groups of 4"),
        (replay_of(live, "x", group_size=8), "group_size = 8, but the source run live asked for groups of 4"),
        (
            replay_of(live, "x", group_deadline_seconds=5, tasks="other:tasks"),
            "trainer.tasks has no effect, nor has trainer.group_deadline_seconds: a run on",
        ),
    ]
    for settings, message in wrong:
        with pytest.raises(SettingsError, match=message):
            await run(settings)
    # What is the source's own has no effect, either, and may stand in the file of both.
    of_live = {name: getattr(live.trainer, name) for name in live.trainer.model_fields_set & set(OF_ASKING)}
    assert "tasks" in of_live
    shadow = replay_of(live, "shadow", group_size=4, **of_live)
    await run(shadow)
    of_shadow = replay_of(live, "y").model_copy(update={"source": SourceSettings(run_id="shadow")})
    with pytest.raises(SettingsError, match="trains on the rollouts of live itself; name that"):
        await run(of_shadow)

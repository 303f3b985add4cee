"""The trainer against the real broker, with a real (tiny) model and a hand-written rest of the world."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fulgurite.schemas.checksum import folder_of, folder_sha256
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import HEADER_REASON
from fulgurite.schemas.errors import Fenced, LogprobMismatch, SettingsError
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import CoordinatorSettings, KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.topics import DEAD_LETTERS, RESOURCES, TRAJECTORIES
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.learners.learner import BadStep, Learner
from fulgurite.streams.trainer import asking, serve
from fulgurite.streams.trainer.checkpoints import Checkpoint, Checkpoints, RunState
from tests.consumers.poison import poison
from tests.streams.trainer_world import RESPONSE, World, all_once, build_model, read_topic, training_events

RUN = "run"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def trainer_settings(tiny_model: Path, tmp_path: Path) -> TrainerSettings:
    return TrainerSettings(
        run_id=RUN,
        model=tiny_model,
        output=tmp_path / "policy",
        tasks="tests.streams.trainer_world:bandit",
        steps=3,
        groups_per_step=4,
        group_size=4,
        pacing_staleness=0,
        learning_rate=2e-2,
        warmup_steps=2,
        group_deadline_seconds=60,
    )


async def train(kafka: KafkaSettings, trainer: TrainerSettings, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        await serve(Settings(kafka=kafka, trainer=trainer), asyncio.Event())


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if reached():
                return
            await asyncio.sleep(0.05)


async def goes_on(kafka: KafkaSettings) -> None:
    """Until a second process has said that it took the run over."""
    async with asyncio.timeout(30):
        while True:
            if sum(isinstance(event, RunStarted) for event in await training_events(kafka, RUN)) == 2:
                return
            await asyncio.sleep(0.2)


async def test_reward_rises_and_every_rollout_is_accounted_for(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    def alter(trajectory: Trajectory) -> Trajectory:
        if trajectory.rollout_id.endswith("3-r1"):
            return trajectory.model_copy(update={"status": "failed", "sequences": [], "reward": None})
        if trajectory.rollout_id.endswith("5-r2"):
            return trajectory.model_copy(update={"partial": "no_reward", "reward": None})
        return trajectory

    trainer = trainer_settings.model_copy(
        update={"steps": 15, "groups_per_step": 8, "group_size": 8, "pacing_staleness": 1}
    )
    async with World(kafka_settings, alter).running() as world:
        await train(kafka_settings, trainer)
    events = await training_events(kafka_settings, RUN)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert [step.step for step in steps] == list(range(1, 16))
    assert [step.version_out for step in steps] == list(range(2, 17))
    assert [type(events[0]), type(events[-1])] == [RunStarted, RunFinished]
    first, last = steps[0].reward_mean, steps[-1].reward_mean
    assert last > first + 0.3, f"reward went from {first} to {last}"
    assert max(step.staleness_max for step in steps) <= 1
    assert max(step.metrics["sampling/sampling_logp_difference/max"] for step in steps[:1]) < 1e-5

    for before, step in itertools.pairwise(steps):  # no time is left out: transactions are a step's, too
        assert step.metrics["timing_s/publish"] > 0
        since_s = (step.window_end_ns - before.window_end_ns) / 1e9
        assert step.metrics["timing_s/step"] == pytest.approx(since_s, abs=0.1)

    fates = all_once(events)
    assert set(fates) == set(world.queued)
    assert len(world.queued) == 15 * 8 * 8
    assert {f for i, f in fates.items() if i.endswith("3-r1")} == {"failed"}
    assert {f for i, f in fates.items() if i.endswith("5-r2")} == {"no_reward"}
    assert set(fates.values()) <= {"trained", "failed", "no_reward", "zero_variance"}

    newest = world.versions[-1]
    kept = sorted((trainer.output / RUN).glob("v*"))
    assert len(kept) == trainer.keep_versions
    assert (folder_of(newest.uri) / "tokenizer.json").is_file()
    assert folder_sha256(folder_of(newest.uri)) == newest.sha256


async def test_an_adapter_is_published_as_one_and_learns_too(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    """Whoever answers loads it with transformers, which finds the base by the name in the adapter's folder."""
    changes = {"lora_rank": 8, "steps": 8, "groups_per_step": 8, "group_size": 8, "learning_rate": 5e-2}
    async with World(kafka_settings).running() as world:
        await train(kafka_settings, trainer_settings.model_copy(update=changes))
    assert {version.kind for version in world.versions} == {"lora"}
    folder = folder_of(world.versions[-1].uri)
    assert {path.suffix for path in folder.iterdir()} >= {".safetensors", ".json"}
    steps = [event for event in await training_events(kafka_settings, RUN) if isinstance(event, TrainingStep)]
    assert steps[-1].reward_mean > steps[0].reward_mean + 0.1


async def test_a_run_that_is_over_is_left_alone(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    trainer = trainer_settings.model_copy(update={"steps": 1, "groups_per_step": 1, "group_size": 2})
    async with World(kafka_settings).running():
        await train(kafka_settings, trainer)
    before = await training_events(kafka_settings, RUN)
    await train(kafka_settings, trainer)
    assert await training_events(kafka_settings, RUN) == before
    with pytest.raises(SettingsError, match=r"trainer\.resource = 'other', but what the log knows as run .* 'policy'"):
        await train(kafka_settings, trainer.model_copy(update={"resource": "other"}))


async def test_a_zombie_is_fenced_and_cannot_publish(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    """The zombie waits for trajectories; a second process takes the run over; then there is work for both."""
    held: list[Trajectory] = []

    def hold(trajectory: Trajectory) -> None:
        held.append(trajectory)

    trainer = trainer_settings.model_copy(update={"steps": 1, "groups_per_step": 2, "group_size": 2})
    async with World(kafka_settings, hold).running() as world:
        zombie = asyncio.create_task(train(kafka_settings, trainer))
        await until(lambda: len(held) == 4)
        heir = asyncio.create_task(train(kafka_settings, trainer))
        await goes_on(kafka_settings)
        for trajectory in held:
            await world.send(trajectory)
        # Whoever comes second finds the other's checkpoint on disk, or its own transaction refused.
        ended = await asyncio.gather(zombie, heir, return_exceptions=True)
    events = await training_events(kafka_settings, RUN)
    assert isinstance(ended[0], Fenced)
    assert sum(isinstance(event, TrainingStep) for event in events) <= 1
    if ended[1] is not None:  # the zombie's unannounced checkpoint stood in the way: the next start removes it
        assert isinstance(ended[1], Fenced)
        await train(kafka_settings, trainer)
        events = await training_events(kafka_settings, RUN)
    assert sum(isinstance(event, TrainingStep) for event in events) == 1
    assert set(all_once(events).values()) <= {"trained", "zero_variance"}


def with_wrong_logprob(trajectory: Trajectory) -> Trajectory:
    """Rewards differ; the third token's log p is another one than the policy's."""
    index = int(trajectory.rollout_id.rpartition("r")[2])
    changed = trajectory.model_copy(deep=True, update={"reward": float(index)})
    changed.sequences[0].logprobs[3] += 0.5
    return changed


async def test_a_sampler_that_disagrees_about_the_same_version_can_stop_the_run(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    def alter(trajectory: Trajectory) -> Trajectory:
        return with_wrong_logprob(trajectory) if trajectory.rollout_id == f"{RUN}-g1-r2" else trajectory

    trainer = trainer_settings.model_copy(update={"on_bad_step": "stop"})
    words = r"version 1: logprob_mismatch rollout run-g1-r2, position 3, token \d+: log p is -.*usual causes"
    async with World(kafka_settings, alter).running():
        with pytest.raises(LogprobMismatch, match=words):
            await train(kafka_settings, trainer)
    assert not any(isinstance(e, TrainingStep) for e in await training_events(kafka_settings, RUN))
    assert len(await read_topic(kafka_settings, RESOURCES)) == 1


async def test_a_window_with_a_token_that_the_sampler_saw_otherwise_is_skipped(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    """One token of one rollout must not end the run, again at each start."""

    def alter(trajectory: Trajectory) -> Trajectory:
        index = int(trajectory.rollout_id.rpartition("r")[2])
        wrong = trajectory.rollout_id == f"{RUN}-g0-r1"
        return with_wrong_logprob(trajectory) if wrong else trajectory.model_copy(update={"reward": float(index)})

    bounds = {"steps": 2, "groups_per_step": 1, "group_size": 2}
    async with World(kafka_settings, alter).running():
        await train(kafka_settings, trainer_settings.model_copy(update=bounds))
    events = await training_events(kafka_settings, RUN)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert [(step.version_out, step.rollout_ids) for step in steps] == [(2, []), (3, [f"{RUN}-g1-r0", f"{RUN}-g1-r1"])]
    assert steps[0].metrics["rollouts/dropped/logprob_mismatch"] == 2.0
    assert steps[0].metrics["sampling/same_version_logp_difference/max"] == pytest.approx(0.5, abs=1e-3)
    fates = all_once(events)
    said = f"logprob_mismatch:rollout {RUN}-g0-r1, position 3, token "
    assert all(fates[f"{RUN}-g0-r{index}"].startswith(said) for index in range(2))
    weights = [decode(ResourceVersion, record.value).sha256 for record in await read_topic(kafka_settings, RESOURCES)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("pacing", [0, 1])
async def test_a_sampler_that_always_disagrees_trains_nothing(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings, pacing: int
) -> None:
    """With a pacing of 1 the second window's tokens are of the version before, whose weights the current one has."""
    bounds = {"steps": 9, "groups_per_step": 1, "group_size": 2, "max_bad_steps": 3, "pacing_staleness": pacing}
    async with World(kafka_settings, with_wrong_logprob).running():
        with pytest.raises(
            LogprobMismatch, match=r"3 steps in a row .*logprob_mismatch rollout run-g\d-r.*usual causes"
        ):
            await train(kafka_settings, trainer_settings.model_copy(update=bounds))
    events = await training_events(kafka_settings, RUN)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert [(step.version_out, step.rollout_ids) for step in steps] == [(2, []), (3, [])]
    assert all(step.metrics["sampling/same_version_tokens"] == 2 * RESPONSE for step in steps)


async def test_while_a_sampler_is_known_to_disagree_what_cannot_be_compared_is_not_trained_on(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    """The weights of version 2 get tokens that are wrong, older ones, and, after a restart, right ones."""

    def alter(trajectory: Trajectory) -> Trajectory:
        number = trajectory.group_id.rpartition("g")[2]
        reward = float(trajectory.rollout_id.rpartition("r")[2])
        changed = with_wrong_logprob(trajectory) if number == "1" else trajectory.model_copy(update={"reward": reward})
        # Of version 1, whose weights were others; and of 2, which has the weights of those after it.
        version = {"2": 1, "3": 2}.get(number, trajectory.max_version)
        spans = [part.model_copy(update={"version": version}) for part in changed.sequences[0].weight_versions]
        sequence = changed.sequences[0].model_copy(update={"weight_versions": spans})
        return changed.model_copy(update={"sequences": [sequence]})

    bounds = {"steps": 4, "groups_per_step": 1, "group_size": 2, "max_bad_steps": 2, "max_staleness": 8}
    trainer = trainer_settings.model_copy(update=bounds)
    async with World(kafka_settings, alter).running():
        with pytest.raises(LogprobMismatch, match=r"2 steps in a row .*nothing could be compared since.*usual causes"):
            await train(kafka_settings, trainer)
        await train(kafka_settings, trainer)
    events = await training_events(kafka_settings, RUN)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert [bool(step.rollout_ids) for step in steps] == [True, False, False, True]
    assert [step.metrics["sampling/same_version_tokens"] for step in steps] == [6.0, 6.0, 0.0, 6.0]
    fates = all_once(events)
    assert all(fates[f"{RUN}-g2-r{index}"].startswith("logprob_mismatch:nothing could be") for index in range(2))
    weights = [decode(ResourceVersion, record.value).sha256 for record in await read_topic(kafka_settings, RESOURCES)]
    assert weights[0] != weights[1] == weights[2] == weights[3] != weights[4]


async def test_a_bad_step_is_skipped_and_the_ledger_says_why(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    """A version is made all the same, of the same weights, so that agents and offsets go on."""

    def alter(trajectory: Trajectory) -> Trajectory:
        return trajectory.model_copy(update={"reward": float(trajectory.rollout_id.rpartition("r")[2])})

    bounds = {"steps": 2, "groups_per_step": 1, "group_size": 2, "grad_norm_limit": 1e-9, "on_bad_step": "skip"}
    async with World(kafka_settings, alter).running() as world:
        await train(kafka_settings, trainer_settings.model_copy(update=bounds))
    events = await training_events(kafka_settings, RUN)
    steps = [event for event in events if isinstance(event, TrainingStep)]
    assert [(step.step, step.version_out, step.rollout_ids, step.tokens) for step in steps] == [
        (1, 2, [], 0), (2, 3, [], 0),
    ]  # fmt: skip
    assert all(step.grad_norm > 1e-9 and step.metrics["rollouts/dropped/grad_norm"] == 2.0 for step in steps)
    fates = all_once(events)
    assert set(fates) == set(world.queued)
    assert all(fate.startswith("grad_norm:") and "trainer.grad_norm_limit = 1e-09" in fate for fate in fates.values())
    assert len({version.sha256 for version in world.versions}) == 1


async def test_a_run_of_which_every_step_is_bad_ends(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    bounds = {"steps": 9, "grad_norm_limit": 1e-9, "max_bad_steps": 3, "zero_variance": "keep"}
    async with World(kafka_settings).running():
        with pytest.raises(BadStep, match=r"3 steps in a row changed nothing, the last one for grad_norm"):
            await train(kafka_settings, trainer_settings.model_copy(update=bounds))
    events = await training_events(kafka_settings, RUN)
    assert [event.step for event in events if isinstance(event, TrainingStep)] == [1, 2]


async def test_windows_without_a_signal_hide_no_bad_steps(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    def alter(trajectory: Trajectory) -> Trajectory:
        """Of every second group all rewards are the same."""
        is_silent = int(trajectory.group_id.rpartition("g")[2]) % 2
        number = float(trajectory.rollout_id.rpartition("r")[2])
        return trajectory.model_copy(update={"reward": 1.0 if is_silent else number})

    shape = {"steps": 8, "groups_per_step": 1, "group_size": 2}
    bounds = {**shape, "grad_norm_limit": 1e-9, "max_bad_steps": 2}
    async with World(kafka_settings, alter).running():
        with pytest.raises(BadStep, match=r"2 steps in a row changed nothing"):
            await train(kafka_settings, trainer_settings.model_copy(update=bounds))


async def test_of_several_updates_only_a_bad_ones_rollouts_are_dropped(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    def alter(trajectory: Trajectory) -> Trajectory:
        """Advantages of 1e-3 in size, but for the first group's 1e3."""
        number = float(trajectory.rollout_id.rpartition("r")[2])
        scale = 1e3 if trajectory.group_id == f"{RUN}-g0" else 1e-3
        return trajectory.model_copy(update={"reward": number * scale})

    shape = {"steps": 1, "groups_per_step": 2, "group_size": 2, "minibatches": 4, "advantage": "mean_centred"}
    changes = {**shape, "grad_norm_limit": 1.0, "on_bad_step": "skip"}
    async with World(kafka_settings, alter).running():
        await train(kafka_settings, trainer_settings.model_copy(update=changes))
    events = await training_events(kafka_settings, RUN)
    (step,) = [event for event in events if isinstance(event, TrainingStep)]
    assert step.rollout_ids == [f"{RUN}-g1-r0", f"{RUN}-g1-r1"]
    assert {(each.rollout_id, each.reason.partition(":")[0]) for each in step.dropped} == {
        (f"{RUN}-g0-r0", "grad_norm"), (f"{RUN}-g0-r1", "grad_norm"),
    }  # fmt: skip
    assert step.tokens == 2 * RESPONSE
    assert (step.metrics["rollouts/trained"], step.metrics["rollouts/dropped/grad_norm"]) == (2.0, 2.0)


async def test_a_window_closed_by_time_does_not_wait_for_the_slowest_and_the_next_one_slides_over_it(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    held: list[Trajectory] = []

    def alter(trajectory: Trajectory) -> Trajectory | None:
        number = float(trajectory.rollout_id.rpartition("r")[2])
        trajectory = trajectory.model_copy(update={"reward": number, "assembled_ns": 1})
        if trajectory.group_id != f"{RUN}-g1":
            return trajectory
        held.append(trajectory)
        return None

    changes = {"steps": 2, "groups_per_step": 2, "window_seconds": 0.5, "overlap_groups": 2}
    async with World(kafka_settings, alter).running() as world:
        running = asyncio.create_task(train(kafka_settings, trainer_settings.model_copy(update=changes)))
        while True:
            events = await training_events(kafka_settings, RUN)
            if any(isinstance(event, TrainingStep) for event in events):
                break
            await asyncio.sleep(0.1)
        for trajectory in held:
            await world.send(trajectory)
        await running
    events = await training_events(kafka_settings, RUN)
    first, second = (event for event in events if isinstance(event, TrainingStep))
    of = [[f"{RUN}-g{group}-r{member}" for member in range(4)] for group in range(3)]
    assert (first.groups, first.rollout_ids, first.again) == (1, of[0], [])
    assert second.again == of[0]
    assert second.metrics["rollouts/trained_again"] == 4.0
    assert set(all_once(events)) == set(world.queued)
    assert len(world.queued) == 12, "three groups: the one that was not there was not asked for again"


async def test_a_window_closed_by_time_has_what_came_while_the_step_before_was_trained(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, list[Trajectory]] = {}
    step, sent, training, answered = Learner.step, threading.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(self: Learner, *rest: Any) -> Any:
        loop.call_soon_threadsafe(training.set)
        sent.wait(60)
        time.sleep(0.6)  # longer than window_seconds
        return step(self, *rest)

    def alter(trajectory: Trajectory) -> None:
        number = float(trajectory.rollout_id.rpartition("r")[2])
        held.setdefault(trajectory.group_id, []).append(trajectory.model_copy(update={"reward": number}))
        if sum(map(len, held.values())) == 4 * 2:
            answered.set()

    monkeypatch.setattr(Learner, "step", slow)
    shape = {"steps": 2, "groups_per_step": 2, "group_size": 2, "pacing_staleness": 2, "window_seconds": 0.5}
    async with World(kafka_settings, alter).running() as world:

        async def send(groups: range) -> None:
            """At once: they are read together."""
            await asyncio.gather(*(world.send(each) for group in groups for each in held[f"{RUN}-g{group}"]))

        running = asyncio.create_task(train(kafka_settings, trainer_settings.model_copy(update=shape)))
        await answered.wait()
        await send(range(3))  # the third one waits for the second window
        await training.wait()
        await send(range(3, 4))
        sent.set()
        await running
    steps = [event for event in await training_events(kafka_settings, RUN) if isinstance(event, TrainingStep)]
    assert [event.groups for event in steps] == [2, 2]


async def test_stragglers_poison_and_broken_groups_do_not_stop_it(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings, unused_tcp_port: int
) -> None:
    """One rollout never ends by itself, one group fails whole, one record has impossible tokens, one is no JSON."""
    held: list[Trajectory] = []

    def alter(trajectory: Trajectory) -> Trajectory | None:
        if trajectory.rollout_id == f"{RUN}-g0-r1":
            held.append(trajectory)
            return None
        if trajectory.group_id == f"{RUN}-g1":
            return trajectory.model_copy(update={"status": "failed", "sequences": [], "reward": None})
        if trajectory.rollout_id == f"{RUN}-g2-r0":
            trajectory.sequences[0].token_ids[2] = 99_999
        return trajectory

    trainer = trainer_settings.model_copy(update={"steps": 2, "groups_per_step": 3, "group_deadline_seconds": 1.0})
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with World(kafka_settings, alter).running() as world:
        await world.send_bytes(f"{RUN}-g0", b'{"run_id": "another one"')  # before the run: not its business

        async def cancel(rollout_id: str) -> None:
            ended = held[0].model_copy(update={"status": "cancelled", "sequences": [], "reward": None})
            assert rollout_id == ended.rollout_id
            await world.send(ended)

        async with fake_coordinator(unused_tcp_port, cancel), asyncio.timeout(60):
            settings = Settings(
                kafka=kafka_settings, trainer=trainer, coordinator=CoordinatorSettings(port=unused_tcp_port, url=url)
            )
            running = asyncio.create_task(serve(settings, asyncio.Event()))
            await until(lambda: bool(world.queued))
            await world.send_bytes(f"{RUN}-g0", b'{"run_id": "run", "mode')
            await poison(kafka_settings, TRAJECTORIES, b'{"run_id": "run"}', f"{RUN}-g0".encode())
            await running

    events = await training_events(kafka_settings, RUN)
    fates = all_once(events)
    assert set(fates) == set(world.queued)
    assert fates[f"{RUN}-g0-r1"] == "deadline"
    assert {fates[f"{RUN}-g1-r{i}"] for i in range(4)} == {"failed"}
    assert fates[f"{RUN}-g2-r0"] == "bad_tokens"
    assert len(world.queued) == (2 * 3 + 1) * 4, "the failed group was asked for again"
    letters = await read_topic(kafka_settings, DEAD_LETTERS)
    reasons = sorted(dict(letter.headers)[HEADER_REASON].decode() for letter in letters)
    assert reasons == ["bad_tokens", "not_json", "undecodable", "undecodable"]
    assert any(letter.value == b'{"run_id": "run", "mode' for letter in letters)


@contextlib.asynccontextmanager
async def fake_coordinator(port: int, cancel: Callable[[str], Awaitable[None]]) -> AsyncGenerator[None]:
    """Takes cancellations, the first of each; knows nothing else."""
    cancelled: set[str] = set()

    async def update(request: web.Request) -> web.Response:
        rollout_id = request.match_info["rollout_id"]
        if rollout_id not in cancelled:
            cancelled.add(rollout_id)
            await cancel(rollout_id)
        return web.json_response({"rollout_id": rollout_id, "status": "cancelled", "start_time": 0.0})

    app = web.Application()
    app.router.add_post("/v1/agl/rollouts/{rollout_id}", update)
    server = web.AppRunner(app)
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", port).start()
    try:
        yield
    finally:
        await server.cleanup()


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_crash_while_training_does_not_change_what_is_trained_on(
    kafka_settings: KafkaSettings,
    trainer_settings: TrainerSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crashes: bool,
) -> None:
    """Groups 0 and 3 come while 1 and 2 are trained on: a restart finds all four. And it keeps the reference it
    began with, which has been moved."""
    held: list[Trajectory] = []
    reached = asyncio.Event()
    other = build_model(tmp_path / "other", seed=9)
    loop, write = asyncio.get_running_loop(), Checkpoints.write

    def alter(trajectory: Trajectory) -> Trajectory | None:
        if trajectory.rollout_id.startswith((f"{RUN}-g0-", f"{RUN}-g3-")):
            held.append(trajectory)
            return None
        return trajectory

    def write_or_die(self: Checkpoints, state: RunState, *rest: Any) -> Checkpoint:
        if state.step == 1 and not reached.is_set():
            loop.call_soon_threadsafe(reached.set)
            if crashes:
                raise RuntimeError("killed before the checkpoint")
        return write(self, state, *rest)

    monkeypatch.setattr(Checkpoints, "write", write_or_die)
    small = {"steps": 2, "groups_per_step": 2, "group_size": 2, "pacing_staleness": 1, "zero_variance": "keep"}
    trainer = trainer_settings.model_copy(update={**small, "kl_coefficient": 0.1})
    assert trainer.model
    moved = trainer.model_copy(update={"model": shutil.copytree(trainer.model, tmp_path / "moved")})
    async with World(kafka_settings, alter).running() as world:
        training = asyncio.create_task(train(kafka_settings, trainer))
        await reached.wait()
        if crashes:
            with pytest.raises(RuntimeError):
                await training
            with pytest.raises(SettingsError, match="began with 2: groups are on their way"):
                await train(kafka_settings, trainer.model_copy(update={"group_size": 4}))
            with pytest.raises(SettingsError, match=r"trainer\.agents = \['solver'\], but run .* began with \[\]"):
                await train(kafka_settings, trainer.model_copy(update={"agents": ["solver"]}))
            for name in ("model", "reference"):
                with pytest.raises(SettingsError, match=rf"trainer\.{name} = .* is the reference of the KL penalty"):
                    await train(kafka_settings, trainer.model_copy(update={name: other}))
        for trajectory in held:
            await world.send(trajectory)
        await (train(kafka_settings, moved) if crashes else training)
    steps = [event for event in await training_events(kafka_settings, RUN) if isinstance(event, TrainingStep)]
    groups = [sorted({rollout_id.rpartition("-")[0] for rollout_id in event.rollout_ids}) for event in steps]
    assert groups == [[f"{RUN}-g1", f"{RUN}-g2"], [f"{RUN}-g0", f"{RUN}-g3"]]


async def test_dead_letters_are_written_once_however_often_their_records_are_read(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings
) -> None:
    """Between versions, where another group was asked for in place of the bad one, the trainer is stopped."""
    held: list[Trajectory] = []
    released = False

    def alter(trajectory: Trajectory) -> Trajectory | None:
        if trajectory.rollout_id.startswith(f"{RUN}-g0-"):
            trajectory.sequences[0].token_ids[-1] = 99
        elif not released and not trajectory.rollout_id.startswith(f"{RUN}-g1-"):
            held.append(trajectory)
            return None
        return trajectory

    small = {"steps": 1, "groups_per_step": 2, "group_size": 2, "zero_variance": "keep"}
    trainer = trainer_settings.model_copy(update=small)
    async with World(kafka_settings, alter).running() as world:
        training = asyncio.create_task(train(kafka_settings, trainer))
        await until(lambda: len(held) == 2)
        training.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await training
        released = True
        for trajectory in held:
            await world.send(trajectory)
        await train(kafka_settings, trainer)
    letters = [record.key for record in await read_topic(kafka_settings, DEAD_LETTERS)]
    assert len(letters) == 2


async def test_rollouts_of_another_policy_are_dead_letters_and_replaced_ever_more_slowly(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "REPLACE_SECONDS", (0.1, 0.4))
    right = False

    def alter(trajectory: Trajectory) -> Trajectory:
        if not right:
            trajectory.sequences[0].resource = "another"
        return trajectory

    small = {"steps": 1, "groups_per_step": 2, "group_size": 2, "zero_variance": "keep"}
    async with World(kafka_settings, alter).running() as world:
        training = asyncio.create_task(train(kafka_settings, trainer_settings.model_copy(update=small)))
        await until(lambda: len(world.queued) >= 12)
        right = True
        await training
    steps = [event for event in await training_events(kafka_settings, RUN) if isinstance(event, TrainingStep)]
    assert len(steps) == 1
    reasons = [dict(record.headers)[HEADER_REASON] for record in await read_topic(kafka_settings, DEAD_LETTERS)]
    assert set(reasons) == {b"wrong_model"}
    assert len(reasons) == sum(each.reason == "wrong_model" for each in steps[0].dropped) >= 8


async def test_a_model_that_cannot_be_trained_is_told_before_it_is_loaded(
    kafka_settings: KafkaSettings, trainer_settings: TrainerSettings, tmp_path: Path
) -> None:
    """There are no weights to load: to try would be another error."""
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(SettingsError, match=r"None positions .* cannot be trained here"):
        await train(kafka_settings, trainer_settings.model_copy(update={"model": tmp_path}))

"""Groups of which no record ever comes, as Kafka's retention took them: said, and given up where the user says so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.settings import CoordinatorSettings, KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import asking, serve, unrecorded
from fulgurite.streams.trainer.groups import Shape
from fulgurite.streams.trainer.unrecorded import Unrecorded
from fulgurite.streams.trainer.windows import Windows
from tests.streams.trainer_world import World, all_once, build_model, training_events

SHAPE = Shape("run", group_size=2, groups_per_step=2, groups_ahead=4, max_staleness=4, group_deadline_seconds=10.0)


@contextlib.asynccontextmanager
async def coordinator(ended: dict[str, float] | None = None) -> AsyncGenerator[str]:
    """Says of these when they ended; without, of each that it ended as it was asked about first."""
    first_asked: dict[str, float] = {}

    async def wait(request: web.Request) -> web.Response:
        ids = (await request.json())["rollout_ids"]
        found = {i: first_asked.setdefault(i, time.time()) for i in ids} if ended is None else ended
        rollouts: list[dict[str, Any]] = [
            {"rollout_id": i, "status": "succeeded", "start_time": 1.0, "end_time": found[i]} for i in ids if i in found
        ]
        return web.Response(text=json.dumps(rollouts), content_type="application/json")

    async def any_other(request: web.Request) -> web.Response:
        return web.Response(status=404)

    app = web.Application()
    app.router.add_post("/v1/agl/waits/rollouts", wait)
    app.router.add_route("*", "/{path:.*}", any_other)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("lost_after", "given_up", "words"), [(None, [], "restart with trainer.lost_after_seconds"), (100.0, [0], "")]
)
async def test_a_group_is_given_up_so_long_after_its_last_rollout_ended(
    lost_after: float | None, given_up: list[int], words: str
) -> None:
    """Group 0 ended long ago, 1 a little later, 2 has a rollout at work, and 3 was settled."""
    windows = Windows(SHAPE, asked=4)
    windows.mark_settled(3)
    now = now_ns()
    ended = {f"run-g{g}-r{m}": now / 1e9 - s for g, s in ((0, 101), (1, 99), (3, 500)) for m in range(2)}
    async with coordinator(ended | {"run-g1-r1": now / 1e9 - 500, "run-g2-r0": now / 1e9 - 500}) as url:
        looking = Unrecorded(url, windows, lost_after)
        assert looking.told(now) == ""
        looking.look()
        await asyncio.sleep(0.5)
        assert looking.told(now).startswith("; 2 groups have ended up to 101 s ago and no record of them has come")
        assert words in looking.told(now)
        looking.give_up(now)
        await looking.close()
    assert sorted(windows.groups) == given_up
    assert windows.deadline_due(now + int(9e9)) == []
    assert windows.deadline_due(now + int(10e9)) == given_up, "by its deadline, as one with a record"


async def test_a_coordinator_that_is_away_keeps_nobody_waiting() -> None:
    looking = Unrecorded("http://127.0.0.1:1", Windows(SHAPE, asked=1), 1.0)
    looking.look()
    await asyncio.sleep(0.05)
    looking.give_up(now_ns())
    assert looking.told(now_ns()) == ""
    async with asyncio.timeout(1):
        await looking.close()


async def test_a_run_goes_on_behind_what_retention_took_over_a_restart(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All that is asked for at first is lost. Without the setting the run stands, and says what to do."""
    caplog.set_level("INFO")
    monkeypatch.setattr(asking, "REPORT_SECONDS", 0.2)
    monkeypatch.setattr(asking, "DRAIN_SECONDS", 1.0)
    monkeypatch.setattr(unrecorded, "TELL_SECONDS", 0.0)
    lost = {f"run-g{group}" for group in range(4)}

    def alter(trajectory: Trajectory) -> Trajectory | None:
        return None if trajectory.group_id in lost else trajectory

    def trainer(**changes: Any) -> TrainerSettings:
        own = {"run_id": "run", "model": tmp_path / "model", "output": tmp_path / "policy", "steps": 2}
        tasks = {"tasks": "tests.streams.trainer_world:bandit", "groups_per_step": 2, "group_size": 4}
        return TrainerSettings.model_validate({**own, **tasks, "zero_variance": "keep", **changes})

    build_model(tmp_path / "model")
    async with asyncio.timeout(60), coordinator() as url, World(kafka_settings, alter).running():
        settings = Settings(kafka=kafka_settings, coordinator=CoordinatorSettings(url=url), trainer=trainer())
        stop = asyncio.Event()
        standing = asyncio.create_task(serve(settings, stop))
        while "restart with trainer.lost_after_seconds" not in caplog.text:
            await asyncio.wait({standing}, timeout=0.05)
            assert not standing.done()
        stop.set()
        await standing
        going = trainer(lost_after_seconds=1.0, group_deadline_seconds=1.0)
        await serve(settings.model_copy(update={"trainer": going}), asyncio.Event())
    events = await training_events(kafka_settings, "run")
    assert len([event for event in events if isinstance(event, TrainingStep)]) == 2
    outcomes = all_once(events)
    assert {i: outcomes[i] for i in outcomes if i.rpartition("-r")[0] in lost} == {
        f"{group}-r{member}": "deadline" for group in lost for member in range(4)
    }

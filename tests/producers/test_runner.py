"""The runner against the real broker and a small coordinator: ends, stops, and the order of its delivery contract."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from fulgurite.producers.agents import as_agent
from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.rewards import emit_reward
from fulgurite.producers.rollout import RolloutContext, current_rollout
from fulgurite.producers.runner import Runner
from fulgurite.schemas.codec import decode
from fulgurite.schemas.coordinator import UpdateAttempt
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, RunnerSettings, Settings, to_environment
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import REWARDS, SPANS
from tests.producers.fake_coordinator import FakeCoordinator
from tests.producers.reading import read_topic


async def spans_of(kafka: KafkaSettings) -> list[Span]:
    return [decode(Span, record.value) for record in await read_topic(kafka, SPANS)]


async def rewards_of(kafka: KafkaSettings) -> list[Reward]:
    return [decode(Reward, record.value) for record in await read_topic(kafka, REWARDS)]


@contextlib.asynccontextmanager
async def a_runner(
    kafka: KafkaSettings, coordinator: FakeCoordinator, agent: Any, concurrency: int = 4
) -> AsyncGenerator[tuple[Runner, asyncio.Event, asyncio.Task[None]]]:
    """A running one; stopped at the end, unless the test did."""
    section = RunnerSettings(heartbeat_seconds=0.1, shutdown_seconds=0.2, concurrency=concurrency)
    settings = Settings(kafka=kafka, runner=section)
    stop = asyncio.Event()
    async with Publisher(kafka) as publisher, CoordinatorClient(coordinator.url) as client:
        runner = Runner(settings, as_agent(agent, "solver"), client, publisher)
        running = asyncio.create_task(runner.run(stop))
        try:
            yield runner, stop, running
        finally:
            stop.set()
            await asyncio.wait({running}, timeout=20)
            running.cancel()
    if not running.cancelled() and (error := running.exception()) is not None:
        raise error


async def test_an_agents_return_spans_and_rewards_are_published(kafka_settings: KafkaSettings) -> None:
    async def agent(task: Any, rollout: RolloutContext) -> float:
        assert current_rollout() is rollout
        with (
            rollout.span("think", input={"question": task}, state={"step": 1}),
            rollout.tool("calc", input="2+3") as tool,
        ):
            tool.output = 5
        emit_reward(0.25, name="style")
        return 1.0

    async with FakeCoordinator() as coordinator, a_runner(kafka_settings, coordinator, agent):
        attempt_id = coordinator.put("r1", {"question": "2+3"}, sampling_parameters={"temperature": 1.0})
        await coordinator.ended(attempt_id)
    end = coordinator.ends[attempt_id]
    assert (end.status, end.error) == ("succeeded", "")
    by_name = {span.name: span for span in await spans_of(kafka_settings)}
    root, think, tool = by_name["invoke_agent solver"], by_name["think"], by_name["execute_tool calc"]
    assert (think.parent_span_id, tool.parent_span_id, root.parent_span_id) == (root.span_id, think.span_id, "")
    assert len({root.trace_id, think.trace_id, tool.trace_id}) == 1
    assert (root.operation, root.status, root.output, root.input) == ("invoke_agent", "ok", "1", '{"question": "2+3"}')
    assert (tool.operation, tool.input, tool.output) == ("execute_tool", "2+3", "5")
    assert think.state == {"step": 1}
    assert {(span.rollout_id, span.attempt_id) for span in by_name.values()} == {("r1", "r1-1")}
    rewards = {reward.name: reward for reward in await rewards_of(kafka_settings)}
    assert rewards["reward"].value == 1.0
    assert rewards["reward"].reward_id == "r1-1.reward"
    assert rewards["style"].value == 0.25


async def test_everything_is_acknowledged_before_the_end_is_reported(kafka_settings: KafkaSettings) -> None:
    seen: dict[str, tuple[int, int]] = {}

    async def count(attempt_id: str, update: UpdateAttempt) -> None:
        seen[attempt_id] = (
            len(await read_topic(kafka_settings, SPANS)),
            len(await read_topic(kafka_settings, REWARDS)),
        )

    def agent(task: Any, rollout: RolloutContext) -> float:
        for number in range(200):
            with rollout.span(f"step {number}"):
                pass
        return 0.5

    async with FakeCoordinator(count) as coordinator, a_runner(kafka_settings, coordinator, agent):
        await coordinator.ended(coordinator.put("r1"))
    assert seen == {"r1-1": (201, 1)}


class Wild:
    """Looks like a number, and is none."""

    def __float__(self) -> float:
        raise RuntimeError("no number \ud83d")


async def test_failures_end_the_attempt_and_never_the_runner(kafka_settings: KafkaSettings) -> None:
    async def agent(task: Any, rollout: RolloutContext) -> Any:
        match task:
            case "raise":
                raise ValueError("no such tool")
            case "exit":
                sys.exit(3)
            case "nan":
                return float("nan")
            case "text":
                return "done"
            case "huge":
                return 10**400
            case "wild":
                return Wild()
            case "half":
                raise ValueError("cut \ud83d")
            case "sleep":
                with rollout.span("long"):
                    await asyncio.sleep(60)
                return None
            case _:
                return None

    expected = {
        "raise": ("failed", "ValueError: no such tool"),
        "exit": ("failed", "AgentExit: the agent exited with 3"),
        "nan": ("failed", "ValueError: the agent returned nan; expected a finite number or None"),
        "text": ("failed", "ValueError: the agent returned a str; expected a finite number or None"),
        "huge": (
            "failed",
            "ValueError: the agent returned a int: int too large to convert to float; expected a finite number or None",
        ),
        "wild": ("failed", "RuntimeError: no number ?"),
        "half": ("failed", "ValueError: cut ?"),
        "sleep": ("timeout", "no end within 0.3 s"),
        "fine": ("succeeded", ""),
    }
    async with FakeCoordinator() as coordinator, a_runner(kafka_settings, coordinator, agent):
        ids = {task: coordinator.put(task, task, timeout_seconds=0.3 if task == "sleep" else 20) for task in expected}
        await coordinator.ended(*ids.values())
    ends = {task: (coordinator.ends[ids[task]].status, coordinator.ends[ids[task]].error) for task in expected}
    assert ends == expected
    assert await rewards_of(kafka_settings) == []
    spans = {(span.rollout_id, span.name): span for span in await spans_of(kafka_settings)}
    failed = spans["raise", "invoke_agent solver"]
    assert (failed.status, failed.status_message) == ("error", "ValueError: no such tool")
    assert spans["sleep", "long"].status_message == "CancelledError"


async def test_a_reply_to_a_heartbeat_stops_an_attempt_and_nothing_is_reported(kafka_settings: KafkaSettings) -> None:
    cancelled = asyncio.Event()

    async def agent(task: Any, rollout: RolloutContext) -> float:
        if task == "stop me":
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
        return 1.0

    async with FakeCoordinator() as coordinator, a_runner(kafka_settings, coordinator, agent) as (runner, _, _):
        attempt_id = coordinator.put("r1", "stop me")
        coordinator.to_stop.add(attempt_id)
        await asyncio.wait_for(cancelled.wait(), 10)
        await coordinator.ended(coordinator.put("r2"))
        assert runner.ended["lost"] == 1
    assert coordinator.reports == ["r2-1"]
    assert any(attempt_id in beat.running for beat in coordinator.beats)
    assert coordinator.beats[-1].stopping


async def test_a_stop_lets_agents_finish_and_gives_the_others_back(kafka_settings: KafkaSettings) -> None:
    started = asyncio.Barrier(3)

    async def agent(task: Any, rollout: RolloutContext) -> float:
        await started.wait()
        await asyncio.sleep(task)
        return 1.0

    async with FakeCoordinator() as coordinator, a_runner(kafka_settings, coordinator, agent) as (_, stop, running):
        quick, slow = coordinator.put("quick", 0.05), coordinator.put("slow", 60)
        await asyncio.wait_for(started.wait(), 10)
        stop.set()
        await asyncio.wait_for(running, 8)
    assert coordinator.ends[quick].status == "succeeded"
    assert (coordinator.ends[slow].status, coordinator.ends[slow].error) == ("unresponsive", "runner stopped")


async def test_hung_threads_are_abandoned_and_too_many_end_the_runner(kafka_settings: KafkaSettings) -> None:
    def agent(task: Any, rollout: RolloutContext) -> float:
        time.sleep(8 if task == "hang" else 0)
        return 1.0

    async def hang_twice(coordinator: FakeCoordinator) -> None:
        async with a_runner(kafka_settings, coordinator, agent, concurrency=2) as (_, _, running):
            await coordinator.ended(coordinator.put("r1", "hang", timeout_seconds=0.2))
            await coordinator.ended(coordinator.put("r2"))  # its slot is free again
            await coordinator.ended(coordinator.put("r3", "hang", timeout_seconds=0.2))
            await asyncio.wait({running}, timeout=10)

    async with FakeCoordinator() as coordinator:
        with pytest.raises(FulguriteError, match="2 agents hang after their timeout"):
            await hang_twice(coordinator)
    assert [coordinator.ends[one].status for one in ("r1-1", "r2-1", "r3-1")] == ["timeout", "succeeded", "timeout"]


async def test_a_report_is_repeated_until_answered_and_a_refusal_is_no_fault(kafka_settings: KafkaSettings) -> None:
    answers = [503, 503, None, 409, None]

    async def faulty(attempt_id: str, update: UpdateAttempt) -> int | None:
        return answers.pop(0)

    async def agent(task: Any, rollout: RolloutContext) -> float:
        return 1.0

    async with FakeCoordinator(faulty) as coordinator, a_runner(kafka_settings, coordinator, agent, concurrency=1):
        await coordinator.ended(coordinator.put("r1"))
        coordinator.put("r2")
        await coordinator.ended(coordinator.put("r3"))
    assert coordinator.reports == ["r1-1", "r1-1", "r1-1", "r2-1", "r3-1"]
    assert sorted(coordinator.ends) == ["r1-1", "r3-1"]


async def test_work_is_asked_for_in_batches_of_the_free_slots(kafka_settings: KafkaSettings) -> None:
    async def agent(task: Any, rollout: RolloutContext) -> float:
        return 1.0

    async with FakeCoordinator() as coordinator:
        ids = [coordinator.put(f"r{number}") for number in range(64)]
        began = time.monotonic()
        async with a_runner(kafka_settings, coordinator, agent, concurrency=16):
            await coordinator.ended(*ids)
        assert time.monotonic() - began < 30
    assert coordinator.dequeues[0].limit == 16
    assert len(coordinator.dequeues) < 40
    assert {reward.rollout_id for reward in await rewards_of(kafka_settings)} == {f"r{number}" for number in range(64)}


AGENT = """
async def agent(task, rollout):
    with rollout.span("work"):
        pass
    return 1.0
"""


@pytest.mark.chaos
@pytest.mark.slow
async def test_kill_9_between_flush_and_report_counts_nothing_twice(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    """Step 4 is done, step 5 is not: the next attempt is made by the lease, each has one reward of its own."""
    (tmp_path / "crash_agent.py").write_text(AGENT)
    process: asyncio.subprocess.Process | None = None
    killed: list[str] = []

    async def kill(attempt_id: str, update: UpdateAttempt) -> int | None:
        if killed or process is None:
            return None
        killed.append(attempt_id)
        os.kill(process.pid, signal.SIGKILL)
        return 503

    async with FakeCoordinator(kill) as coordinator:
        values = {
            "kafka": kafka_settings.model_dump(exclude_none=True, exclude={"sasl_password"}),
            "coordinator": {"url": coordinator.url},
            "runner": {"agent": "crash_agent:agent", "concurrency": 2},
        }

        async def start() -> asyncio.subprocess.Process:
            code = "import sys; from fulgurite.producers.runner import main; "
            code += "from fulgurite.schemas.settings import load_settings; sys.exit(main(load_settings()))"
            return await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, **to_environment(values)}
            )

        process = await start()
        coordinator.put("r1")
        assert await asyncio.wait_for(process.wait(), 60) == -signal.SIGKILL
        assert [reward.reward_id for reward in await rewards_of(kafka_settings)] == ["r1-1.reward"]
        assert not coordinator.ends

        process = await start()
        try:
            await coordinator.ended(coordinator.put("r1", attempt=2), seconds=60)
        finally:
            process.send_signal(signal.SIGTERM)
            status = await asyncio.wait_for(process.wait(), 20)
        assert status == 0
    assert killed == ["r1-1"]
    assert list(coordinator.ends) == ["r1-2"]
    assert [reward.reward_id for reward in await rewards_of(kafka_settings)] == ["r1-1.reward", "r1-2.reward"]
    names = [(span.attempt_id, span.name) for span in await spans_of(kafka_settings)]
    assert names == [(f"r1-{number}", name) for number in (1, 2) for name in ("work", "invoke_agent agent")]

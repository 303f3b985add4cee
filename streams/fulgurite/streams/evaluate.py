"""Evaluation: held-out tasks as rollouts of mode `val`, done by the same runners, gateway and policy as all others.

Promises: each task once per kind of sampling, with ids that follow from run, name and index, so that an evaluation run
twice (or again after a crash) does no rollout twice. It only asks and waits: what came of it is rows in ClickHouse,
with `evaluation` and `sampling` in the metadata and, per call, the version that answered. Trainers skip mode `val`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Literal

from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.producers.service import run_service
from fulgurite.schemas.coordinator import MAX_ENQUEUE, EnqueueRollout
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.rollouts import RolloutConfig
from fulgurite.schemas.settings import Settings
from fulgurite.streams.trainer.tasks import load_tasks, task_input

logger = logging.getLogger(__name__)

Sampling = Literal["sampled", "greedy"]
SAMPLINGS: tuple[Sampling, ...] = ("sampled", "greedy")
TEMPERATURE: dict[Sampling, float] = {"sampled": 1.0, "greedy": 0.0}

MAX_TASKS = 100_000
WAIT_SECONDS = 2.0
"""One long poll; progress is reported after each."""

REPORT_SECONDS = 5.0

Report = Callable[[int, int], None]
"""Called with rollouts ended and rollouts in all."""


def main(settings: Settings, name: str, tasks: str, count: int, samples: Sequence[str]) -> int:
    """`fulgurite evaluate`: exit code 0 when every rollout has ended."""

    async def serve(stop: asyncio.Event) -> None:
        working = asyncio.create_task(evaluate(settings, name=name, tasks=tasks, count=count, samples=samples))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
            logger.info("stopped; started again with the same name, the evaluation goes on")
            return
        await working

    return run_service("evaluate", settings.log, serve)


async def evaluate(
    settings: Settings,
    *,
    name: str,
    tasks: str,
    count: int,
    samples: Sequence[str] = SAMPLINGS,
    report: Report | None = None,
) -> list[str]:
    """Asks for `count` tasks per kind of sampling and waits until all have ended; gives the rollout ids."""
    rollouts = evaluation_rollouts(settings, name=name, tasks=tasks, count=count, samples=samples)
    rollout_ids = [rollout.rollout_id for rollout in rollouts]
    async with CoordinatorClient(settings.coordinator.url) as client:
        await client.enqueue(rollouts)
        logger.info("evaluation %s: %d rollouts asked for", name, len(rollouts))
        await wait_for_all(client, rollout_ids, report or _logged(name))
    return rollout_ids


def evaluation_rollouts(
    settings: Settings, *, name: str, tasks: str, count: int, samples: Sequence[str]
) -> list[EnqueueRollout]:
    """What is asked for. Raises SettingsError for what cannot be."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", name):
        raise SettingsError(f"evaluation name {name!r}: at most 32 letters, digits, dots, dashes and underscores")
    if not 1 <= count <= MAX_TASKS:
        raise SettingsError(f"count = {count}: must be 1 to {MAX_TASKS}")
    kinds: list[Sampling] = [kind for kind in SAMPLINGS if kind in samples]
    if not kinds or set(samples) - set(SAMPLINGS):
        raise SettingsError(f"samples = {list(samples)}: any of {', '.join(SAMPLINGS)}")
    run_id = settings.trainer.run_id or "evaluation"
    function = load_tasks(tasks, "tasks")
    inputs = [task_input(function, index) for index in range(count)]
    return [
        EnqueueRollout(
            rollout_id=f"{run_id}-val-{name}-{kind}-{index}",
            input=inputs[index],
            mode="val",
            run_id=run_id,
            task_id=f"val-{index}",
            agent=settings.trainer.agent,
            config=RolloutConfig(
                timeout_seconds=settings.trainer.rollout_timeout_seconds,
                sampling_parameters={**settings.trainer.sampling_parameters, "temperature": TEMPERATURE[kind]},
            ),
            metadata={"evaluation": name, "sampling": kind},
        )
        for kind in kinds
        for index in range(count)
    ]


async def wait_for_all(client: CoordinatorClient, rollout_ids: list[str], report: Report) -> None:
    """Until all have ended; the coordinator's own clock sees to it that each of them does."""
    pending = dict.fromkeys(rollout_ids)  # in the order in which they are done
    while pending:
        ended = await client.wait(list(pending)[:MAX_ENQUEUE], WAIT_SECONDS)  # as many as one request may name
        for rollout in ended:
            pending.pop(rollout.rollout_id, None)
        report(len(rollout_ids) - len(pending), len(rollout_ids))


def _logged(name: str) -> Report:
    begun = reported = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported < REPORT_SECONDS and done < total:
            return
        reported = now
        left = f"{(now - begun) / done * (total - done):.0f} s left" if done else "none yet"
        logger.info("evaluation %s: %d of %d rollouts ended, %s", name, done, total, left)

    return report

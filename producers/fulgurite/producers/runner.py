"""The runner: asks the coordinator for work, runs N agents at once, delivers what they produced, then reports the end.

      coordinator ──1. lease (long poll, as many as slots are free)──►  attempt ──2.──► agent(task, rollout)
        ▲      ▲                                                          │                 │ spans, rewards at once
        │      └── heartbeat for all attempts; the reply names those to stop              ▼
        │                                                                 3. reward, root span ──► outbox ──► Kafka
        └────────── 5. the attempt's end (HTTP) ◄── 4. every acknowledgement ◄───────────────────────────────┘

consumes: work, over HTTP             produces: `spans`, `rewards`, the ends of attempts over HTTP
waits for: work, the agent, acks      unblocked by: the agent's end, its timeout, a stop from the coordinator

The delivery contract (steps 2 to 5 are in `attempt.py`). A crash (kill -9) after step
1. the attempt is leased to this worker: it has produced nothing. Its lease expires, the coordinator makes another one.
2. the agent has run; its spans and rewards went out as they came: the log has some of them, under this attempt's id.
   The lease expires. Trajectories are made of the rollout's last attempt only, so nothing counts twice.
3. the reward the agent returned and the root span are in the outbox: as 2. The reward's id is made of the attempt's id,
   so sent twice it counts once.
4. the broker has acknowledged everything: as 2, with all of it in the log.
5. the end was reported, the answer is not known: the coordinator has it or has it not. Not: as 4. It has: the attempt
   is over. Without a crash the report is repeated until it is answered; reported twice, it counts once.
Whatever is acknowledged stays, and an end is never reported before all that belongs to it is in the log.

Promises: agents' errors, timeouts and wild returns end the attempt, never the runner. A stop (SIGTERM) asks for no more
work, gives running agents runner.shutdown_seconds, then reports the others as `unresponsive`, which is retried at once
by default. A coroutine is cancelled at its timeout; a thread cannot be, so it is abandoned, and when too many hang the
process ends for its supervisor to start it anew. A coroutine that blocks the event loop stops the heartbeats: the
leases expire.

Does not know what the agent does, nor whether a rollout is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from time import monotonic
from typing import Any

import httpx

from fulgurite.producers.agents import CANCEL_SECONDS, Agent, AgentCalls, load_agent
from fulgurite.producers.attempt import AttemptRun, End, Means
from fulgurite.producers.backoff import LOG_SECONDS, Backoff
from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.producers.prompts import PromptTemplates
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.rollout import describe
from fulgurite.producers.service import run_service
from fulgurite.schemas.coordinator import MAX_DEQUEUE, AttemptedRollout, WorkerBeat
from fulgurite.schemas.errors import CoordinatorError, FulguriteError, Undelivered
from fulgurite.schemas.settings import Settings

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.005
"""After a slot is free, wait this long for others: agents end in bursts, and one ask serves them all."""

FAREWELL_SECONDS = 3.0
"""At shutdown, after the agents were stopped: for their records and reports."""

BEATS_PER_LEASE = 3
"""Heartbeats within the shortest lease: two may be lost."""


@dataclass(frozen=True, slots=True)
class _Slot:
    run: AttemptRun
    task: asyncio.Task[End]


class Runner:
    """One worker. `run` returns after `stop` is set and everything that ran was reported or given up."""

    def __init__(
        self,
        settings: Settings,
        agent: Agent,
        client: CoordinatorClient,
        publisher: Publisher,
        prompts: PromptTemplates | None = None,
    ) -> None:
        self._settings = settings
        self._client = client
        self._calls = AgentCalls()
        self.worker_id = settings.runner.worker_id or default_worker_id()
        self._means = Means(settings, agent, self._calls, client, publisher, self.worker_id, prompts)
        self._capacity = settings.runner.concurrency
        self._slots: dict[str, _Slot] = {}
        self.ended: Counter[str] = Counter()
        """Attempts by how they ended; `lost` are those the coordinator ended."""
        self._slot_freed = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure_logged = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        pulling = asyncio.create_task(self._pull())
        beating = asyncio.create_task(self._beat())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({pulling, beating, stopping, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            await _cancel(pulling)
            await self._shut_down(0.0 if self._failure.done() else self._settings.runner.shutdown_seconds)
        finally:
            await _cancel(beating, stopping)
        await self._say_goodbye()
        for finished in (pulling, beating, self._failure):
            if finished.done() and not finished.cancelled():
                finished.result()

    async def _pull(self) -> None:
        """Step 1, for ever."""
        while True:
            while len(self._slots) >= self._capacity:
                self._slot_freed.clear()
                await self._slot_freed.wait()
                await asyncio.sleep(GATHER_SECONDS)
            limit = min(self._capacity - len(self._slots), MAX_DEQUEUE)
            for attempted in await self._client.dequeue(limit, self.worker_id, self._settings.runner.poll_seconds):
                self._start(attempted)

    def _start(self, attempted: AttemptedRollout) -> None:
        run = AttemptRun(attempted, self._means)
        if run.attempt_id in self._slots:
            return
        task = asyncio.create_task(run.run())
        self._slots[run.attempt_id] = _Slot(run, task)
        task.add_done_callback(lambda task: self._ended(run, task))
        if attempted.config.unresponsive_seconds < self._settings.runner.heartbeat_seconds * BEATS_PER_LEASE:
            self._beat_now.set()

    def _ended(self, run: AttemptRun, task: asyncio.Task[End]) -> None:
        del self._slots[run.attempt_id]
        self._slot_freed.set()
        if task.cancelled():
            return
        error = task.exception()
        hung = self._calls.hung
        if error is None and hung >= self._capacity:
            error = FulguriteError(
                f"{hung} agents hang after their timeout and cannot be stopped (bound: runner.concurrency = "
                f"{self._capacity}); this process ends, so that its supervisor starts a fresh one"
            )
        if error is not None:
            if not self._failure.done():
                self._failure.set_exception(error)
            return
        end = task.result()
        self.ended["lost" if end.lost else end.status] += 1
        if end.status != "succeeded" and monotonic() - self._failure_logged >= LOG_SECONDS:
            self._failure_logged = monotonic()
            logger.warning("attempt %s: %s: %s (so far: %s)", run.attempt_id, end.status, end.error, self._counts())

    async def _beat(self) -> None:
        """One sign of life for all attempts, often enough for the shortest lease; stops what the reply names."""
        backoff = Backoff(logger)
        while True:
            try:
                reply = await self._client.beat(self.worker_id, self._sign_of_life())
            except (httpx.TransportError, CoordinatorError) as error:
                await backoff.wait(f"heartbeat not taken by the coordinator: {describe(error)}")
                continue
            backoff.reset()
            for attempt_id in reply.stop:
                if (slot := self._slots.get(attempt_id)) is not None:
                    slot.run.stop_for("lost")
            shortest = min(
                (slot.run.attempted.config.unresponsive_seconds for slot in self._slots.values()), default=float("inf")
            )
            self._beat_now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._settings.runner.heartbeat_seconds, shortest / BEATS_PER_LEASE)):
                    await self._beat_now.wait()

    def _sign_of_life(self, stopping: bool = False) -> WorkerBeat:
        return WorkerBeat(
            running=list(self._slots),
            capacity=self._capacity,
            stopping=stopping,
            heartbeat_stats={"ended": dict(self.ended), "hung": self._calls.hung},
        )

    async def _shut_down(self, grace_seconds: float) -> None:
        """Running agents get their time; the rest is stopped and reported, as far as Kafka and coordinator answer."""
        await self._wait_for_attempts(grace_seconds)
        for slot in self._slots.values():
            slot.run.stop_for("shutdown")
        await self._wait_for_attempts(CANCEL_SECONDS + FAREWELL_SECONDS)
        await _cancel(*(slot.task for slot in self._slots.values()))

    async def _wait_for_attempts(self, seconds: float) -> None:
        tasks = {slot.task for slot in self._slots.values()}
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def _say_goodbye(self) -> None:
        with contextlib.suppress(httpx.TransportError, CoordinatorError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._client.beat(self.worker_id, self._sign_of_life(stopping=True))
        logger.info("attempts: %s", self._counts())

    def _counts(self) -> str:
        return ", ".join(f"{count} {status}" for status, count in self.ended.most_common()) or "none"


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """The service: waits for Kafka and the coordinator, then works until `stop`."""
    agent = load_agent(settings.runner.agent)
    publisher = Publisher(settings.kafka, settings.producer, settings.redaction)
    prompts = PromptTemplates(settings.kafka)
    try:
        async with CoordinatorClient(settings.coordinator.url) as client:
            for peer_is_there in (publisher.start, client.wait_until_healthy):
                if not await _unless_stopped(peer_is_there(), stop):
                    return
            runner = Runner(settings, agent, client, publisher, prompts)
            concurrency = settings.runner.concurrency
            logger.info("ready: worker %s, agent %s, %d at once", runner.worker_id, agent.name, concurrency)
            await runner.run(stop)
    finally:
        await prompts.close()
        try:
            # What is left belongs to attempts that were never reported as ended: they are tried again.
            await publisher.close(FAREWELL_SECONDS)
        except Undelivered as error:
            logger.warning("at the end: %s", error)


def main(settings: Settings) -> int:
    """`fulgurite runner`."""
    return run_service("runner", settings.log, lambda stop: serve(settings, stop))


def default_worker_id() -> str:
    """Host and process: unique among the living, and readable."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:64] or "host"
    return f"{host}-{os.getpid()}"


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def _unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Whether the work was done before `stop` was set; it is cancelled if not."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    done = task.done()
    await _cancel(task, stopping)
    if done:
        task.result()
    return done

"""One attempt, from its lease to its report: steps 2 to 5 of the delivery contract in `runner.py`.

Promises: whatever the agent does (raises, hangs, returns nonsense, exits), the attempt gets an end; the end is reported
only after everything the attempt produced is acknowledged. Does not know other attempts, nor how work is asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from typing import Literal

from fulgurite.producers.agents import Agent, AgentCalls, reward_of
from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.producers.outbox import Outbox
from fulgurite.producers.prompts import PromptTemplates
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.rollout import RolloutContext, as_text, describe
from fulgurite.schemas.coordinator import AttemptedRollout
from fulgurite.schemas.errors import CoordinatorError, Undelivered
from fulgurite.schemas.ids import MAX_ID_CHARS
from fulgurite.schemas.rollouts import AttemptEnd
from fulgurite.schemas.settings import Settings

logger = logging.getLogger(__name__)

ROOT_TEXT_CHARS = 65_536
"""Of the task on the root span; the whole task is on the rollout's `queued` event."""

LOST_SECONDS = 2.0
"""How long the spans of an attempt that is no longer ours may wait for the broker."""

Stop = Literal["lost", "shutdown"]
"""Why an attempt is stopped: it is no longer ours (cancelled, timed out), or this runner ends."""


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended."""

    status: AttemptEnd
    error: str = ""
    reward: float | None = None
    lost: bool = False
    """The coordinator had taken it back: it was not reported."""


@dataclass(frozen=True, slots=True)
class Means:
    """What all attempts of one runner share."""

    settings: Settings
    agent: Agent
    calls: AgentCalls
    client: CoordinatorClient
    publisher: Publisher
    worker_id: str
    prompts: PromptTemplates | None = None


class AttemptRun:
    """`run` carries the attempt out; `stop_for` ends it early."""

    def __init__(self, attempted: AttemptedRollout, means: Means) -> None:
        self.attempted = attempted
        self.attempt_id = attempted.attempt.attempt_id
        self._means = means
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()

    def stop_for(self, reason: Stop) -> None:
        if not self._stop.done():
            self._stop.set_result(reason)

    @property
    def stopped_for(self) -> Stop | None:
        return self._stop.result() if self._stop.done() else None

    async def run(self) -> End:
        kafka = self._means.settings.kafka
        publisher = self._means.publisher
        outbox = Outbox(publisher, kafka.topic, kafka.max_record_bytes, publisher.redactor)
        rollout = RolloutContext(
            self.attempted,
            gateway_url=self._means.settings.gateway.url,
            agent=self._means.agent.name,
            outbox=outbox,
            prompts=self._means.prompts,
        )
        try:
            with rollout.active(as_text(rollout.task)[:ROOT_TEXT_CHARS]) as root:
                end = await self._run_agent(rollout)  # 2.
                outbox.allow(2)
                rollout.allow_final_reward()
                if end.reward is not None:  # 3.
                    rollout.reward(end.reward, reward_id=_reward_id(self.attempt_id), source=rollout.agent)
                    root.output = f"{end.reward:g}"
                root.error = end.error
                root.attributes["fulgurite.attempt_status"] = end.status
            end = await self._deliver(outbox, end)  # 4.
            return await self._report(end)  # 5.
        finally:
            outbox.close()

    async def _run_agent(self, rollout: RolloutContext) -> End:
        """Step 2: until the agent ends, its time is up, or it is stopped."""
        work = asyncio.create_task(self._means.agent.run(rollout.task, rollout, self._means.calls))
        try:
            await asyncio.wait({work, self._stop}, timeout=rollout.timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            ended = work.done()
        finally:
            await self._means.calls.end(work)
        if not ended and self.stopped_for == "lost":
            return End("cancelled", "stopped by the coordinator")
        if not ended and self.stopped_for == "shutdown":
            return End("unresponsive", "runner stopped")
        if not ended:
            return End("timeout", f"no end within {rollout.timeout_seconds:g} s")
        if work.cancelled():
            return End("failed", "the agent cancelled itself")
        if (error := work.exception()) is not None:
            return End("failed", describe(error))
        try:
            return End("succeeded", reward=reward_of(work.result()))
        except Exception as error:  # what an agent returns may be an object of its own, whose methods raise anything
            return End("failed", describe(error))

    async def _deliver(self, outbox: Outbox, end: End) -> End:
        """Step 4: waits for every acknowledgement, for ever, unless the attempt is no longer ours."""
        flushing = asyncio.create_task(outbox.flush())
        try:
            if self.stopped_for is None:
                await asyncio.wait({flushing, self._stop}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({flushing}, timeout=LOST_SECONDS if self.stopped_for == "lost" else None)
        finally:
            flushing.cancel()
        if not flushing.done():
            return end
        error = flushing.exception()
        if isinstance(error, Undelivered):
            return End("failed", f"what the attempt produced is not in the log: {error}")
        if error is not None:
            raise error
        return end

    async def _report(self, end: End) -> End:
        """Step 5: until it is answered. An attempt that is no longer ours was ended by the coordinator."""
        if self.stopped_for == "lost":
            return End(end.status, end.error, end.reward, lost=True)
        attempt = self.attempted.attempt
        try:
            await self._means.client.end_attempt(
                attempt.rollout_id, attempt.attempt_id, end.status, worker_id=self._means.worker_id, error=end.error
            )
        except CoordinatorError as error:
            logger.warning("attempt %s is over otherwise than %s: %s", attempt.attempt_id, end.status, error)
            return End(end.status, end.error, end.reward, lost=True)
        return end


def _reward_id(attempt_id: str) -> str:
    """Always the same for an attempt: sent twice, its reward counts once."""
    name = f"{attempt_id}.reward"
    return name if len(name) <= MAX_ID_CHARS else hashlib.sha256(name.encode()).hexdigest()

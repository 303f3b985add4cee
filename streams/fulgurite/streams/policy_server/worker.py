"""Drives the engine from the event loop: the queue of requests, pauses, and the swap of weights between two steps.

    submit ──► waiting ──► engine.step ──► Underway          run(): steps while there is work and no pause
                 ▲              ▲
       pause ────┘   reload ────┘ (between two steps)

State: `policy` (None until the first load), `version` (a label), `paused`. What a pause does with requests under way:

| mode  | under way                                                                       | new ones       |
|-------|---------------------------------------------------------------------------------|----------------|
| keep  | frozen at their last token, at once; after `resume` they go on from there       | wait           |
| wait  | finish on the weights they have; pause returns when they did                     | wait           |
| abort | answered with what they have, finish_reason "abort"                              | wait           |

A request that was frozen over a swap is prefilled again on the new weights, so it is exact, and says token by token
which version sampled it. A swap needs no pause to be correct: steps and swaps exclude each other. After one the
version is `default` until it is set, so that a label never names weights it was not set for, whatever dies in
between.

Steps run on one thread of their own, so that health and control routes answer while a large model computes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from fulgurite.schemas.errors import FulguriteError
from fulgurite.streams.policy_server.engine import MAX_ROWS, Engine, Generation
from fulgurite.streams.policy_server.policy import Policy, load_policy
from fulgurite.streams.policy_server.underway import Underway

logger = logging.getLogger(__name__)

UNNAMED_VERSION = "default"
"""vLLM's name for weights that nobody named."""
PauseMode = Literal["keep", "wait", "abort"]


class NotReady(FulguriteError):
    """No weights yet."""


class QueueFull(FulguriteError):
    """More requests wait than the settings allow."""


class Worker:
    def __init__(self, max_waiting_requests: int) -> None:
        self.paused = False
        self.requests_finished = 0
        self._max_under_way = max_waiting_requests + MAX_ROWS
        self._engine: Engine | None = None
        self._underway: dict[Generation, Underway] = {}
        # Nobody waits for them any more; the engine forgets them before its next step.
        self._gone: list[Generation] = []
        # One reload after the other: the last one asked for is the one that serves.
        self._reload_lock = asyncio.Lock()
        # Held around every step and swap: whoever has it may touch the engine's rows.
        self._engine_lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._stepping = ThreadPoolExecutor(1, thread_name_prefix="engine")

    @property
    def policy(self) -> Policy | None:
        return self._engine.policy if self._engine else None

    @property
    def version(self) -> str:
        return self._engine.version if self._engine else UNNAMED_VERSION

    @property
    def running(self) -> int:
        return len(self._engine.running) if self._engine else 0

    @property
    def tokens_sampled(self) -> int:
        return self._engine.tokens_sampled if self._engine else 0

    @property
    def waiting(self) -> int:
        return len(self._engine.waiting) if self._engine else 0

    async def set_version(self, version: str) -> None:
        """Names the weights that are served. Raises NotReady."""
        async with self._engine_lock:
            if self._engine is None:
                raise NotReady("there are no weights to name: load some first")
            self._engine.version = version

    def submit(self, generations: Sequence[Generation], streamed: bool) -> Underway:
        """Whoever submits closes, whatever happens in between. Raises NotReady, QueueFull."""
        if self._engine is None:
            raise NotReady("no weights are loaded yet")
        if len(self._underway) + len(generations) > self._max_under_way:
            raise QueueFull(f"{self.waiting} requests wait already (policy_server.max_waiting_requests)")
        underway = Underway(generations, streamed)
        for generation in generations:
            self._underway[generation] = underway
            self._engine.submit(generation)
        self._wake.set()
        return underway

    def close(self, underway: Underway) -> None:
        """What is not finished ends here: nobody pays for the answer of a client that went away. Never waits."""
        for generation in underway.generations:
            if self._underway.pop(generation, None) is not None:
                self._gone.append(generation)
        self._wake.set()

    async def pause(self, mode: PauseMode) -> None:
        """Returns when no token is sampled any more; see the table above."""
        self.paused = True
        async with self._engine_lock:  # a step that began before ends before
            if mode == "abort" and self._engine is not None:
                self._publish(self._engine.abort())
        if mode == "wait":
            await self._drain()

    async def _drain(self) -> None:
        # The lock is given up between steps: an abort, a resume or a swap need not wait for the end.
        while self.paused and self._engine is not None and self._engine.running:
            async with self._engine_lock:
                self._forget_gone(self._engine)
                if self.paused:
                    await self._step(self._engine, admit=False)

    def resume(self) -> None:
        self.paused = False
        self._wake.set()

    async def reload(self, folder: Path) -> None:
        """Reads beside the running steps, swaps between two. Raises PolicyRefused; then the old weights serve on."""
        async with self._reload_lock:
            policy = await asyncio.to_thread(load_policy, folder, self.policy)
            async with self._engine_lock:
                if self._engine is None:
                    self._engine = Engine(policy, UNNAMED_VERSION)
                else:
                    # A number said what the weights were. Another label says who loads them, and stays, as vLLM's does.
                    label = self._engine.version
                    self._engine.swap(policy, UNNAMED_VERSION if label.isdecimal() else label)
        logger.info("weights loaded from %s", folder)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. An error of a step goes out and ends the process: rather no tokens than wrong ones."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (engine := self._engine) is not None:
                async with self._engine_lock:
                    self._forget_gone(engine)
                    if self.paused or engine.idle:
                        break
                    await self._step(engine, admit=True)

    async def _step(self, engine: Engine, admit: bool) -> None:
        finished = await asyncio.get_running_loop().run_in_executor(self._stepping, engine.step, admit)
        self._publish([*engine.running, *finished])

    def _forget_gone(self, engine: Engine) -> None:
        for generation in self._gone:
            engine.cancel(generation)
        self._gone.clear()

    def _publish(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            finished = generation.finish_reason is not None
            self.requests_finished += finished
            underway = self._underway.get(generation)
            if underway is not None:
                underway.publish(generation)
                if finished:
                    del self._underway[generation]

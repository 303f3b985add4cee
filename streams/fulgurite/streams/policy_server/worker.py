"""Drives the engine from the event loop: the queue of requests, pauses, and the swap of weights between two steps.

    generate ──► waiting ──► engine.step ──► answer          run(): steps while there is work and no pause
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from fulgurite.schemas.errors import FulguriteError
from fulgurite.streams.policy_server.engine import MAX_ROWS, Engine, Generation
from fulgurite.streams.policy_server.policy import Policy, load_policy

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
        self.tokens_sampled = 0
        self.requests_finished = 0
        self._max_under_way = max_waiting_requests + MAX_ROWS
        self._engine: Engine | None = None
        self._answers: dict[Generation, asyncio.Future[None]] = {}
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
    def waiting(self) -> int:
        return len(self._answers) - self.running

    async def set_version(self, version: str) -> None:
        """Names the weights that are served. Raises NotReady."""
        async with self._engine_lock:
            if self._engine is None:
                raise NotReady("there are no weights to name: load some first")
            self._engine.version = version

    async def generate(self, generation: Generation) -> None:
        """Returns at its end; cancelled, it is forgotten. Raises NotReady, QueueFull."""
        engine = self._engine
        if engine is None:
            raise NotReady("no weights are loaded yet")
        if len(self._answers) >= self._max_under_way:
            raise QueueFull(f"{self.waiting} requests wait already (policy_server.max_waiting_requests)")
        answer = self._answers[generation] = asyncio.get_running_loop().create_future()
        engine.submit(generation)
        self._wake.set()
        try:
            await answer
        except asyncio.CancelledError:
            async with self._engine_lock:
                engine.cancel(generation)
            raise
        finally:
            self._answers.pop(generation, None)

    async def pause(self, mode: PauseMode) -> None:
        """Returns when no token is sampled any more; see the table above."""
        self.paused = True
        async with self._engine_lock:  # a step that began before ends before
            if mode == "abort" and self._engine is not None:
                self._deliver(self._engine.abort())
        if mode == "wait":
            await self._drain()

    async def _drain(self) -> None:
        # The lock is given up between steps: an abort, a resume or a swap need not wait for the end.
        while self.paused and self._engine is not None and self._engine.running:
            async with self._engine_lock:
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
                    self._engine.swap(policy, UNNAMED_VERSION)
        logger.info("weights loaded from %s", folder)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. An error of a step goes out and ends the process: rather no tokens than wrong ones."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (engine := self._engine) is not None and not self.paused and not engine.idle:
                async with self._engine_lock:
                    if not self.paused:
                        await self._step(engine, admit=True)

    async def _step(self, engine: Engine, admit: bool) -> None:
        self._deliver(await asyncio.get_running_loop().run_in_executor(self._stepping, engine.step, admit))

    def _deliver(self, finished: list[Generation]) -> None:
        for generation in finished:
            self.tokens_sampled += len(generation.tokens)
            self.requests_finished += 1
            answer = self._answers.get(generation)
            if answer is not None and not answer.done():
                answer.set_result(None)

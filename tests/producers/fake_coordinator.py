"""A coordinator of a few lines, with faults on order: what the runner's tests lease from and report to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import time
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from fulgurite.schemas.coordinator import (
    Attempt,
    AttemptedRollout,
    DequeueRequest,
    UpdateAttempt,
    WorkerBeat,
    WorkerBeatReply,
)
from fulgurite.schemas.rollouts import RolloutConfig

OnEnd = Callable[[str, UpdateAttempt], Awaitable[int | None]]
"""Called with an attempt's end before it is recorded; may return a status to answer instead."""


class FakeCoordinator:
    """Leases what `put` gave it; remembers ends and beats. No leases expire, nothing is retried by itself."""

    def __init__(self, on_end: OnEnd | None = None) -> None:
        self.queue: asyncio.Queue[AttemptedRollout] = asyncio.Queue()
        self.ends: dict[str, UpdateAttempt] = {}
        self.reports: list[str] = []
        """Every report that came in, also those answered with an error."""
        self.beats: list[WorkerBeat] = []
        self.dequeues: list[DequeueRequest] = []
        self.to_stop: set[str] = set()
        self._on_end = on_end
        self._changed = asyncio.Condition()
        app = web.Application()
        app.router.add_get("/v1/agl/health", self._health)
        app.router.add_post("/v1/agl/queues/rollouts/dequeue", self._dequeue)
        app.router.add_post("/v1/agl/rollouts/{rollout_id}/attempts/{attempt_id}", self._update_attempt)
        app.router.add_post("/v1/agl/workers/{worker_id}", self._beat)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        self.url = ""

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    def put(self, rollout_id: str, task: Any = None, attempt: int = 1, **config: Any) -> str:
        """Queues an attempt; gives its id."""
        attempt_id = f"{rollout_id}-{attempt}"
        now = time()
        self.queue.put_nowait(
            AttemptedRollout(
                rollout_id=rollout_id,
                input=task,
                status="preparing",
                mode="train",
                task_id="t1",
                group_id="g1",
                config=RolloutConfig(**config),
                start_time=now,
                attempt=Attempt(
                    rollout_id=rollout_id,
                    attempt_id=attempt_id,
                    sequence_id=attempt,
                    status="preparing",
                    start_time=now,
                ),
            )
        )
        return attempt_id

    async def ended(self, *attempt_ids: str, seconds: float = 20.0) -> None:
        """Waits until these have ended."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(lambda: all(one in self.ends for one in attempt_ids))

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _dequeue(self, request: web.Request) -> web.Response:
        asked = DequeueRequest.model_validate_json(await request.read())
        self.dequeues.append(asked)
        leased: list[AttemptedRollout] = []
        try:
            leased.append(await asyncio.wait_for(self.queue.get(), asked.wait_seconds))
        except TimeoutError:
            return web.json_response([])
        while len(leased) < asked.limit and not self.queue.empty():
            leased.append(self.queue.get_nowait())
        return web.json_response([one.model_dump(mode="json") for one in leased])

    async def _update_attempt(self, request: web.Request) -> web.Response:
        attempt_id = request.match_info["attempt_id"]
        update = UpdateAttempt.model_validate_json(await request.read())
        self.reports.append(attempt_id)
        if self._on_end is not None and (status := await self._on_end(attempt_id, update)) is not None:
            return web.json_response({"detail": "on order"}, status=status)
        known = self.ends.get(attempt_id)
        if known is not None and known.status != update.status:
            return web.json_response({"detail": f"already {known.status}"}, status=409)
        self.ends[attempt_id] = update
        async with self._changed:
            self._changed.notify_all()
        answer = Attempt(
            rollout_id=request.match_info["rollout_id"],
            attempt_id=attempt_id,
            sequence_id=1,
            status=update.status or "running",
            start_time=time(),
        )
        return web.json_response(answer.model_dump(mode="json"))

    async def _beat(self, request: web.Request) -> web.Response:
        beat = WorkerBeat.model_validate_json(await request.read())
        self.beats.append(beat)
        reply = WorkerBeatReply(stop=sorted(self.to_stop & set(beat.running)))
        return web.json_response(reply.model_dump(mode="json"))

"""The routes under /v1/agl: requests to commands, records to JSON. Agent Lightning's paths, shapes and statuses.

Every error is {"detail": "…"}: 404 unknown id, 409 it has ended otherwise, 413 too large, 422 not what the route takes,
429 queue full, 503 not ready, or the log did not confirm in time (ask again; ids make asking again safe).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fulgurite.consumers.coordinator import views
from fulgurite.consumers.coordinator.engine import Engine
from fulgurite.consumers.coordinator.leases import Leases, Workers
from fulgurite.consumers.coordinator.refused import Refused
from fulgurite.consumers.coordinator.state import AttemptRecord, RolloutRecord
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.coordinator import (
    AttemptedRollout,
    DequeueRequest,
    EnqueueRequest,
    EnqueueRollout,
    Rollout,
    UpdateAttempt,
    UpdateRollout,
    WaitRequest,
    WorkerBeat,
    WorkerBeatReply,
    attempt_end,
)
from fulgurite.schemas.errors import BufferFull
from fulgurite.schemas.ids import MAX_ID_CHARS, OptionalId
from fulgurite.schemas.rollouts import Mode, RolloutStatus
from fulgurite.schemas.topics import WORKERS
from fulgurite.schemas.workers import WorkerHeartbeat

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

MIN_BODY_BYTES = 64 * 1024 * 1024
"""Bound of a request's body unless one record may be larger: 10,000 tasks of 6 KB."""
MAX_PAGE = 1_000
MAX_WAITING_RECORDS = 5_000
"""Heartbeats are not published while more records than this wait for the broker: commands need the room."""
_SCAN_CHUNK = 10_000
"""Rollouts looked at before others get their turn, so that listing a million does not delay a lease."""

ROLLOUTS_JSON: TypeAdapter[Sequence[Rollout | AttemptedRollout]] = TypeAdapter(Sequence[Rollout | AttemptedRollout])


class StartRollout(EnqueueRollout):
    """POST /v1/agl/rollouts: a rollout that its caller works on itself, past the queue."""

    worker_id: OptionalId = ""


class ListRollouts(BaseModel):
    """GET /v1/agl/rollouts."""

    status_in: list[RolloutStatus] = Field(default_factory=list)
    mode: Mode | None = None
    run_id: OptionalId | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    offset: Annotated[int, Field(ge=0)] = 0


Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """`not_ready` says why requests cannot be served now, None when they can."""

    def __init__(
        self,
        engine: Engine,
        leases: Leases,
        workers: Workers,
        publisher: Publisher,
        not_ready: Callable[[], str | None],
        max_record_bytes: int,
    ) -> None:
        self._engine = engine
        self._state = engine.state
        self._leases = leases
        self._workers = workers
        self._publisher = publisher
        self._not_ready = not_ready
        self._max_body_bytes = max(MIN_BODY_BYTES, 2 * max_record_bytes)

    def app(self) -> Starlette:
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/statistics", self.statistics),
            ("POST", "/queues/rollouts/enqueue", self.enqueue),
            ("POST", "/queues/rollouts/dequeue", self.dequeue),
            ("POST", "/waits/rollouts", self.wait),
            ("GET", "/rollouts", self.list_rollouts),
            ("POST", "/rollouts", self.start_rollout),
            ("GET", "/rollouts/{rollout_id}", self.get_rollout),
            ("POST", "/rollouts/{rollout_id}", self.update_rollout),
            ("GET", "/rollouts/{rollout_id}/attempts", self.list_attempts),
            ("GET", "/rollouts/{rollout_id}/attempts/latest", self.latest_attempt),
            ("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}", self.update_attempt),
            ("GET", "/workers", self.list_workers),
            ("GET", "/workers/{worker_id}", self.get_worker),
            ("POST", "/workers/{worker_id}", self.beat),
        ]
        return Starlette(
            routes=[
                Route("/v1/agl/health", self.health),
                *(Route(f"/v1/agl{path}", self._ready(handler), methods=[method]) for method, path, handler in routes),
            ],
            exception_handlers={Refused: _refused},
        )

    def _ready(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            if (reason := self._not_ready()) is not None:
                raise Refused(503, reason)
            return await handler(request)

        return checked

    async def health(self, request: Request) -> Response:
        reason = self._not_ready()
        if reason is not None:
            return JSONResponse({"status": "unavailable", "detail": reason}, 503)
        return JSONResponse({"status": "ok"})

    async def statistics(self, request: Request) -> Response:
        return JSONResponse(views.statistics(self._state, self._leases))

    async def enqueue(self, request: Request) -> Response:
        body = await self._body(request, EnqueueRequest)
        return self._rollouts(await self._engine.enqueue(body.rollouts), 201)

    async def dequeue(self, request: Request) -> Response:
        body = await self._body(request, DequeueRequest)
        if body.worker_id:
            self._workers.heard(body.worker_id).last_dequeue_time = time.time()
        work = self._engine.dequeue(body.limit, body.worker_id, body.wait_seconds)
        granted = await _unless_gone(request, work)
        return self._rollouts([record for record, _ in granted or []])

    async def wait(self, request: Request) -> Response:
        body = await self._body(request, WaitRequest)
        await _unless_gone(request, self._engine.wait_for_end(body.rollout_ids, body.timeout))
        found = (self._state.rollouts.get(rollout_id) for rollout_id in dict.fromkeys(body.rollout_ids))
        return self._rollouts([record for record in found if record is not None and record.ended_ns])

    async def start_rollout(self, request: Request) -> Response:
        body = await self._body(request, StartRollout)
        record, _ = await self._engine.start(body, body.worker_id)
        return self._rollout(record, 201)

    async def list_rollouts(self, request: Request) -> Response:
        query = request.query_params
        given: dict[str, Any] = {name: query[name] for name in query if name != "status_in"}
        statuses = [each for value in query.getlist("status_in") for each in value.split(",")]
        wanted = _valid(lambda: ListRollouts.model_validate({**given, "status_in": statuses}))
        total = 0
        page: list[Rollout | AttemptedRollout] = []
        for index, record in enumerate(list(self._state.rollouts.values())):
            if index % _SCAN_CHUNK == _SCAN_CHUNK - 1:
                await asyncio.sleep(0)
            if wanted.mode not in (None, record.mode) or wanted.run_id not in (None, record.run_id):
                continue
            if wanted.status_in and views.status(record, self._leases) not in wanted.status_in:
                continue
            if wanted.offset <= total < wanted.offset + wanted.limit:
                page.append(views.rollout(record, self._leases))
            total += 1
        items = ROLLOUTS_JSON.dump_python(page, mode="json")
        return JSONResponse({"items": items, "limit": wanted.limit, "offset": wanted.offset, "total": total})

    async def get_rollout(self, request: Request) -> Response:
        return self._rollout(self._record(request))

    async def update_rollout(self, request: Request) -> Response:
        record = self._record(request)
        body = await self._body(request, UpdateRollout)
        if body.status != "cancelled":
            raise Refused(
                422, f"status: only cancelled can be asked for, not {body.status}; the rest follows from attempts"
            )
        await self._engine.cancel(record.rollout_id, body.reason)
        return self._rollout(record)

    async def list_attempts(self, request: Request) -> Response:
        record = self._record(request)
        items = [views.attempt(record, each, self._leases).model_dump(mode="json") for each in record.attempts]
        return JSONResponse({"items": items, "limit": len(items), "offset": 0, "total": len(items)})

    async def latest_attempt(self, request: Request) -> Response:
        record = self._record(request)
        if record.latest is None:
            return JSONResponse(None)
        return _json(views.attempt(record, record.latest, self._leases))

    async def update_attempt(self, request: Request) -> Response:
        record = self._record(request)
        attempt = self._attempt(record, request.path_params["attempt_id"])
        body = await self._body(request, UpdateAttempt)
        end = attempt_end(body.status)
        if end is not None:
            await self._engine.end_attempt(record.rollout_id, attempt.attempt_id, end, body.error, body.metadata)
        elif attempt.end is not None:
            raise Refused(409, f"attempt {attempt.attempt_id} of rollout {record.rollout_id} has ended: {attempt.end}")
        elif body.status == "running" or body.last_heartbeat_time is not None:
            self._leases.renew(attempt.attempt_id, asyncio.get_running_loop().time())
        return _json(views.attempt(record, attempt, self._leases))

    async def list_workers(self, request: Request) -> Response:
        items = [asdict(worker) for worker in self._workers.all()]
        return JSONResponse({"items": items, "limit": len(items), "offset": 0, "total": len(items)})

    async def get_worker(self, request: Request) -> Response:
        worker = self._workers.get(request.path_params["worker_id"])
        if worker is None:
            raise Refused(404, f"there is no worker {request.path_params['worker_id']}")
        return JSONResponse(asdict(worker))

    async def beat(self, request: Request) -> Response:
        worker_id = str(request.path_params["worker_id"])
        body = await self._body(request, WorkerBeat)
        heartbeat = _valid(
            lambda: WorkerHeartbeat(
                worker_id=worker_id,
                status="stopped" if body.stopping else "busy" if body.running else "idle",
                running=body.running,
                capacity=body.capacity,
                stats=body.heartbeat_stats,
            )
        )
        self._workers.beat(heartbeat, time.time())
        stop: list[str] = []
        for attempt_id in body.running:
            rollout_id = self._state.open_attempts.get(attempt_id)
            owner = None if rollout_id is None else self._state.rollouts[rollout_id].attempts[-1].worker_id
            if owner is None or owner not in ("", worker_id):
                stop.append(attempt_id)
            else:
                self._leases.renew(attempt_id, asyncio.get_running_loop().time())
        await self._announce(heartbeat)
        return _json(WorkerBeatReply(stop=stop))

    async def _announce(self, heartbeat: WorkerHeartbeat) -> None:
        """To the topic `workers`, for tables and dashboards: never in the way of a lease."""
        if self._publisher.waiting > MAX_WAITING_RECORDS:
            logger.warning("a heartbeat of %s is not published: the broker is behind", heartbeat.worker_id)
            return
        try:
            ack = await self._publisher.publish(WORKERS, heartbeat.worker_id, heartbeat)
        except BufferFull as error:
            logger.warning("a heartbeat of %s is not published: %s", heartbeat.worker_id, error)
        else:
            ack.add_done_callback(_log_failure)

    def _record(self, request: Request) -> RolloutRecord:
        rollout_id = str(request.path_params["rollout_id"])
        record = self._state.rollouts.get(rollout_id)
        if record is None:
            raise Refused(404, f"there is no rollout {rollout_id[:MAX_ID_CHARS]}")
        return record

    def _attempt(self, record: RolloutRecord, attempt_id: str) -> AttemptRecord:
        attempt = record.attempt(attempt_id)
        if attempt is None:
            raise Refused(404, f"rollout {record.rollout_id} has no attempt {attempt_id[:MAX_ID_CHARS]}")
        return attempt

    def _rollout(self, record: RolloutRecord, status: int = 200) -> Response:
        return _json(views.rollout(record, self._leases), status)

    def _rollouts(self, records: Sequence[RolloutRecord], status: int = 200) -> Response:
        shown = [views.rollout(record, self._leases) for record in records]
        return Response(ROLLOUTS_JSON.dump_json(shown), status, media_type="application/json")

    async def _body(self, request: Request, model: type[M]) -> M:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self._max_body_bytes:
                raise Refused(413, f"the body is over {self._max_body_bytes} bytes: send fewer rollouts at once")
        return _valid(lambda: model.model_validate_json(bytes(data) or b"{}"))


def _valid(validate: Callable[[], T]) -> T:
    try:
        return validate()
    except ValidationError as error:
        items = error.errors(include_url=False, include_context=False, include_input=False)
        where = [f"{'.'.join(str(part) for part in item['loc']) or 'body'}: {item['msg']}" for item in items[:5]]
        raise Refused(422, "; ".join(where)) from None


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Its result; cancels it and gives None when the client hangs up first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await task
        return None
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse({"detail": str(error)}, error.status, headers)


def _log_failure(ack: asyncio.Future[Any]) -> None:
    if not ack.cancelled() and (error := ack.exception()) is not None:
        logger.warning("a worker's heartbeat did not reach the broker: %r", error)

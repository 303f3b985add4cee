"""The coordinator's HTTP API as a client: for runners, trainers and scripts.

Promises: a coordinator that is away or answers 5xx is tried again for ever, with backoff and a log line every few
seconds; a request it refuses (4xx) raises CoordinatorError with its status and reason. Trying again is harmless:
rollouts get their id here, before they are sent, so creating one twice is the same as once; an attempt's end may be
reported twice; work leased in an answer that was lost comes back when its lease expires.

Routes and shapes: `fulgurite.schemas.coordinator`. Knows nothing of agents or Kafka.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from fulgurite.producers.backoff import Backoff
from fulgurite.schemas.coordinator import (
    MAX_ENQUEUE,
    MAX_WAIT_SECONDS,
    Attempt,
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
)
from fulgurite.schemas.errors import CoordinatorError
from fulgurite.schemas.ids import new_id
from fulgurite.schemas.rollouts import AttemptEnd

logger = logging.getLogger(__name__)

API = "/v1/agl"

REQUEST_SECONDS = 10.0
"""Longest that an answer may take, beyond what the request itself asks to wait."""

CONNECTIONS = 64
"""Kept open; a runner uses a few at once."""

MAX_ERROR_CHARS = 1_000
"""Of a refusal's text in the error."""

_TOO_MANY_REQUESTS = 429

T = TypeVar("T")

_ROLLOUTS = TypeAdapter(list[Rollout])
_ATTEMPTED = TypeAdapter(list[AttemptedRollout])
_ROLLOUT = TypeAdapter(Rollout)
_ATTEMPT = TypeAdapter(Attempt)
_BEAT_REPLY = TypeAdapter(WorkerBeatReply)


class CoordinatorClient:
    """Use as `async with CoordinatorClient(settings.coordinator.url) as client`."""

    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self._url,
            timeout=httpx.Timeout(REQUEST_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            transport=transport,
            trust_env=False,  # a proxy from the environment is for the internet, not for the coordinator
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def enqueue(self, rollouts: Sequence[EnqueueRollout]) -> list[Rollout]:
        """Creates rollouts, in requests of at most MAX_ENQUEUE. Ids missing are made here, in the objects given."""
        created: list[Rollout] = []
        for rollout in rollouts:
            rollout.rollout_id = rollout.rollout_id or new_id()
        for at in range(0, len(rollouts), MAX_ENQUEUE):
            request = EnqueueRequest(rollouts=list(rollouts[at : at + MAX_ENQUEUE]))
            created += await self._post("/queues/rollouts/enqueue", request, _ROLLOUTS)
        return created

    async def dequeue(self, limit: int = 1, worker_id: str = "", wait_seconds: float = 0.0) -> list[AttemptedRollout]:
        """Leases up to `limit` rollouts; waits up to wait_seconds for the first. Empty when none came."""
        request = DequeueRequest(limit=limit, worker_id=worker_id, wait_seconds=wait_seconds)
        return await self._post("/queues/rollouts/dequeue", request, _ATTEMPTED, wait_seconds)

    async def rollout(self, rollout_id: str) -> Rollout:
        """The rollout as it stands."""
        return await self._request("GET", f"/rollouts/{_quoted(rollout_id)}", None, _ROLLOUT)

    async def cancel(self, rollout_id: str, reason: str = "") -> Rollout:
        """Ends a rollout, whatever its state."""
        request = UpdateRollout(status="cancelled", reason=reason)
        return await self._post(f"/rollouts/{_quoted(rollout_id)}", request, _ROLLOUT)

    async def end_attempt(
        self, rollout_id: str, attempt_id: str, status: AttemptEnd, *, worker_id: str = "", error: str = ""
    ) -> Attempt:
        """Reports an attempt's end. Only after everything it produced is acknowledged: the barrier rests on this order.

        Raises CoordinatorError 409 when the attempt is already over with another end.
        """
        request = UpdateAttempt(status=status, worker_id=worker_id or None, error=error)
        return await self.update_attempt(rollout_id, attempt_id, request)

    async def update_attempt(self, rollout_id: str, attempt_id: str, update: UpdateAttempt) -> Attempt:
        """Any sign of an attempt: its end, its worker, that it is alive."""
        return await self._post(f"/rollouts/{_quoted(rollout_id)}/attempts/{_quoted(attempt_id)}", update, _ATTEMPT)

    async def wait(self, rollout_ids: Sequence[str], timeout_seconds: float = MAX_WAIT_SECONDS) -> list[Rollout]:
        """Those of the rollouts that have ended, as soon as all have or time is up."""
        request = WaitRequest(rollout_ids=list(rollout_ids), timeout=timeout_seconds)
        return await self._post("/waits/rollouts", request, _ROLLOUTS, timeout_seconds)

    async def beat(self, worker_id: str, beat: WorkerBeat) -> WorkerBeatReply:
        """A worker's sign of life. Tried once (httpx.TransportError, CoordinatorError): the next beat tells more."""
        response = await self._http.post(f"{API}/workers/{_quoted(worker_id)}", json=beat.model_dump(mode="json"))
        _raise_for_refusal(response)
        return _parsed(_BEAT_REPLY, response)

    async def wait_until_healthy(self) -> None:
        """Returns when the coordinator answers; waits for ever."""
        backoff = Backoff(logger)
        while True:
            try:
                if (await self._http.get(f"{API}/health")).is_success:
                    return
                problem = "is not ready"
            except httpx.TransportError as error:
                problem = f"does not answer: {error!r}"
            await backoff.wait(f"the coordinator at {self._url} {problem}")

    async def _post(self, path: str, body: BaseModel, shape: TypeAdapter[T], wait_seconds: float = 0.0) -> T:
        return await self._request("POST", path, body.model_dump_json(exclude_none=True).encode(), shape, wait_seconds)

    async def _request(
        self, method: str, path: str, body: bytes | None, shape: TypeAdapter[T], wait_seconds: float = 0.0
    ) -> T:
        backoff = Backoff(logger)
        timeout = httpx.Timeout(REQUEST_SECONDS, read=REQUEST_SECONDS + wait_seconds, pool=None)
        headers = {"content-type": "application/json"} if body is not None else {}
        while True:
            try:
                response = await self._http.request(method, API + path, content=body, headers=headers, timeout=timeout)
            except httpx.TransportError as error:
                problem = f"does not answer: {error!r}"
            else:
                if not response.is_server_error and response.status_code != _TOO_MANY_REQUESTS:
                    _raise_for_refusal(response)
                    return _parsed(shape, response)
                problem = f"answered {response.status_code}: {response.text[:MAX_ERROR_CHARS]}"
            await backoff.wait(f"the coordinator at {self._url} {problem}")


def _raise_for_refusal(response: httpx.Response) -> None:
    if not response.is_success:
        raise CoordinatorError(response.status_code, response.text[:MAX_ERROR_CHARS])


def _parsed(shape: TypeAdapter[T], response: httpx.Response) -> T:
    try:
        return shape.validate_json(response.content)
    except ValidationError as error:
        reason = f"{response.request.method} {response.request.url} gave what this client cannot read: {error}"
        raise CoordinatorError(response.status_code, reason[:MAX_ERROR_CHARS]) from None


def _quoted(name: str) -> str:
    return quote(name, safe="")

"""The policy server as the gateway sees it: one chat completion, asked again while nobody can answer it.

Promises: `complete` returns what the server answered, whatever its status, or raises ApiError(503 or 504) when
`backend_seconds` are over. Asking again is safe: no byte of an answer has reached the agent yet, so what a dying server
sampled is seen by nobody and recorded nowhere. Asked again: refused and broken connections, 502, 503, 504 (a swap, a
restart, a full queue). Not asked again: everything else, it is the model's answer to this request.

Which version sampled: servers that know say it per token (`weight_versions`). vLLM 0.32 does not in chat completions;
for such a server the version is bounded by asking GET /weight_info before and after. Knows neither spans nor Kafka.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from fulgurite.producers.gateway.calls import Call, loads_lenient
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.schemas.settings import GatewaySettings

logger = logging.getLogger(__name__)

AWAY_STATUSES: Final = frozenset({502, 503, 504})
BACKOFF_SECONDS: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""A swap takes tens of milliseconds, a restart seconds."""
WEIGHT_INFO_SECONDS: Final = 5.0
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Of one answer: a million tokens with their logprobs."""
LOG_EVERY_SECONDS: Final = 5.0


@dataclass(slots=True, frozen=True)
class Answer:
    """What the backend said to one call."""

    status: int
    body: bytes
    seconds: float
    """Of the try that was answered."""
    tries: int
    version_before: str | None = None
    """Label that /weight_info gave before and after, where the server does not give versions itself."""
    version_after: str | None = None

    def json(self) -> Any:
        """The body parsed; NaN and Infinity pass, so that they can be found. Raises ValueError."""
        return loads_lenient(self.body)


class Backend:
    """Use as an async context manager."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._url = settings.backend_url.rstrip("/")
        self._backend_seconds = settings.backend_seconds
        # The gateway bounds its own concurrency; a second bound here would only hide a queue.
        self._connections = settings.max_concurrent_requests * 2
        self._bounds_versions = True
        self._session: aiohttp.ClientSession | None = None
        self._logged_at = -LOG_EVERY_SECONDS

    async def __aenter__(self) -> Backend:
        connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=30)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session, "Backend is used outside its context"
        return self._session

    async def complete(self, call: Call) -> Answer:
        """The answer. Raises ApiError: 503 when nobody could answer in time, 504 when somebody was still at it."""
        deadline = time.monotonic() + self._backend_seconds
        body = call.backend_body
        headers = {"content-type": "application/json"}
        if call.authorization:
            headers["authorization"] = call.authorization
        tries = 0
        while True:
            tries += 1
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    answer = await self._once(body, headers, tries)
            except TimeoutError:
                message = f"the policy server did not answer within {self._backend_seconds:g} s"
                raise ApiError(504, "backend_timeout", message) from None
            except aiohttp.ClientError as error:
                away = type(error).__name__
            else:
                if answer.status not in AWAY_STATUSES:
                    return answer
                away = f"status {answer.status}"
            pause = BACKOFF_SECONDS[min(tries, len(BACKOFF_SECONDS)) - 1]
            if time.monotonic() + pause >= deadline:
                message = f"the policy server is away ({away}) for {self._backend_seconds:g} s, {tries} tries"
                raise ApiError(503, "backend_unavailable", message)
            self._log_away(away)
            await asyncio.sleep(pause)

    async def _once(self, body: bytes, headers: dict[str, str], tries: int) -> Answer:
        before = await self.weight_version() if self._bounds_versions else None
        began = time.monotonic()
        async with self.session.post(f"{self._url}/v1/chat/completions", data=body, headers=headers) as response:
            data = await _read(response)
            status = response.status
        seconds = time.monotonic() - began
        if status != 200:
            return Answer(status, data, seconds, tries)
        self._bounds_versions = b'"weight_versions"' not in data
        after = await self.weight_version() if self._bounds_versions else None
        return Answer(status, data, seconds, tries, before, after)

    async def weight_version(self) -> str | None:
        """The label /weight_info gives, None where there is none to be had."""
        try:
            async with (
                asyncio.timeout(WEIGHT_INFO_SECONDS),
                self.session.get(f"{self._url}/weight_info") as response,
            ):
                info = loads_lenient(await _read(response)) if response.status == 200 else {}
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return None
        label = info.get("weight_version") if isinstance(info, dict) else None
        return str(label) if label is not None else None

    async def models(self, authorization: str) -> tuple[int, bytes]:
        """GET /v1/models as it is. Raises ApiError(503)."""
        headers = {"authorization": authorization} if authorization else {}
        try:
            async with asyncio.timeout(self._backend_seconds):
                async with self.session.get(f"{self._url}/v1/models", headers=headers) as response:
                    return response.status, await _read(response)
        except (TimeoutError, aiohttp.ClientError) as error:
            message = f"the policy server is away ({type(error).__name__})"
            raise ApiError(503, "backend_unavailable", message) from None

    async def health(self, timeout_seconds: float) -> str:
        """Empty when the backend is healthy, else what is wrong."""
        try:
            async with asyncio.timeout(timeout_seconds), self.session.get(f"{self._url}/health") as response:
                return "" if response.status == 200 else f"status {response.status}"
        except (TimeoutError, aiohttp.ClientError) as error:
            return type(error).__name__

    def _log_away(self, away: str) -> None:
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_SECONDS:
            self._logged_at = now
            logger.warning("backend %s is away (%s); calls wait and try again", self._url, away)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            response.close()
            raise ApiError(502, "backend_invalid", f"the policy server's answer is over {MAX_ANSWER_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)

"""An answer of a backend that is still coming: the Exchange of exchange.py over HTTP.

Its connection goes back to be used again only when all of the answer was read. Else it is closed, which is how a
backend learns that nobody wants the rest: an agent that hangs up ends the generation. Its seat is left either way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Final

from fulgurite.producers.gateway.errors import BROKEN, ApiError
from fulgurite.producers.gateway.exchange import BackendKind
from fulgurite.producers.gateway.http_connection import Broken, Response
from fulgurite.producers.gateway.http_encoding import Inflated
from fulgurite.producers.gateway.labels import Seen
from fulgurite.producers.gateway.places import Capacity, Seat

if TYPE_CHECKING:
    from fulgurite.producers.gateway.replica import Replica

logger = logging.getLogger(__name__)

_VERSIONS_MARK: Final = b'"weight_versions"'
"""Cannot stand within a text of the answer: there its quotes are escaped."""
_MARK_BYTES: Final = len(_VERSIONS_MARK)


class HttpExchange:
    """An answer that is still coming. Close it."""

    def __init__(
        self,
        replica: Replica,
        seat: Seat,
        response: Response | Inflated,
        route: str,
        tries: int,
        before: Seen | None,
        adapter_version: int | None,
        silence_seconds: float,
    ) -> None:
        self._replica = replica
        self.seat = seat
        self._response = response
        self._route = route
        self._silence_seconds = silence_seconds
        self._clock = asyncio.get_running_loop().time
        self._ends_at = self._clock() + replica.answer_seconds
        self._says_versions = False
        self._has_failed = False
        self._before = before
        self.adapter_version = adapter_version
        self.tries = tries

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    @property
    def kind(self) -> BackendKind:
        return self._replica.kind

    @property
    def capacity(self) -> Capacity:
        return self.seat.capacity

    @property
    def endpoint(self) -> str:
        return self._replica.url

    @property
    def resource(self) -> str:
        return self._replica.settings.resource if self.kind == "vllm" else ""

    @property
    def version_before(self) -> str | None:
        return self._before.label if self._before else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ApiError: 502 when it breaks or is too large, 504 when nothing comes, or for
        too long."""
        response = self._response
        size, tail = 0, b""
        while True:
            try:
                chunk = response.read_now()
                if not chunk and not response.at_eof:
                    async with asyncio.timeout_at(min(self._clock() + self._silence_seconds, self._ends_at)):
                        chunk = await response.read()
            except Broken as error:
                self.failed(str(error))
                raise ApiError(502, BROKEN, "the backend broke off in the middle of its answer") from None
            except TimeoutError:
                self._ensure_in_time()
                if not self._replica.looks_well:
                    self.failed("silence")
                message = f"the backend said nothing for {self._silence_seconds:g} s (gateway.silence_seconds)"
                raise ApiError(504, "backend_timeout", message) from None
            if not chunk:
                return
            self._ensure_in_time()
            size += len(chunk)
            if size > self._replica.max_answer_bytes:
                message = f"the backend's answer is over {self._replica.max_answer_bytes} bytes"
                raise ApiError(502, "backend_invalid", f"{message} (gateway.max_answer_bytes)")
            if not self._says_versions:
                self._says_versions = _VERSIONS_MARK in chunk or _VERSIONS_MARK in tail + chunk[:_MARK_BYTES]
                tail = (tail + chunk[-_MARK_BYTES:])[-_MARK_BYTES:]
            yield chunk

    async def version_after(self) -> str | None:
        """Asks, unless the answer said itself which version sampled it."""
        if self.kind != "vllm" or self.status != 200 or self.adapter_version is not None:
            return None
        if self._is_whole():
            self._replica.learned(self._route, gives_versions=self._says_versions)
        return None if self._says_versions else await self._replica.label(self._before)

    def works(self) -> None:
        """See `Exchange`."""
        self.seat.works()

    def succeeded(self) -> None:
        """See `Exchange`."""
        self.seat.succeeded()

    def failed(self, why: str) -> None:
        """See `Exchange`."""
        if not self._has_failed:
            self._has_failed = True
            logger.warning("backend %s broke off in the middle of an answer (%s)", self.endpoint, why)
            self.seat.failed(self._clock())
            self._replica.doubt()

    def close(self) -> None:
        """Ends it: what the backend has not said yet is not wanted."""
        if self._is_whole():
            self.seat.succeeded()
        else:
            self._response.close()
        self.seat.leave()

    def _ensure_in_time(self) -> None:
        """Raises ApiError(504) for an answer that goes on and on. Says nothing of how well the backend is."""
        if self._clock() >= self._ends_at:
            seconds = self._replica.answer_seconds
            message = f"the answer was not over after {seconds:g} s (gateway.answer_seconds)"
            raise ApiError(504, "backend_timeout", message)

    def _is_whole(self) -> bool:
        return self._response.at_eof

"""One policy server's weight routes, as vLLM has them under VLLM_SERVER_DEV_MODE=1 and the embedded server as well.

Errors come in two kinds, because they mean different things: Refused (the server answered 4xx: it will say so again)
and Unreachable (no answer, or 5xx: it may be different in a moment). Knows nothing of versions' files or of Kafka.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp

from fulgurite.schemas.errors import FulguriteError

MAX_MESSAGE_CHARS = 500


class Refused(FulguriteError):
    """The server answered 4xx: it did not do it and will not."""


class Unreachable(FulguriteError):
    """No answer, or 5xx. `answered` says whether the server is there at all."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


@dataclass(frozen=True, slots=True)
class State:
    """What a server says of itself."""

    label: str | None
    """Its weight version: ours are decimal numbers, everything else is nobody's."""
    paused: bool

    @property
    def version(self) -> int | None:
        return int(self.label) if self.label and self.label.isascii() and self.label.isdecimal() else None


class PolicyServer:
    """The routes, one method each. Every call takes at most `request_seconds`."""

    def __init__(self, url: str, session: aiohttp.ClientSession, request_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._request_seconds = request_seconds

    async def state(self) -> State:
        info = await self._call("GET", "/weight_info")
        paused = await self._call("GET", "/is_paused")
        label = info.get("weight_version")
        return State(None if label is None else str(label), bool(paused.get("is_paused")))

    async def pause(self) -> None:
        """Freezes requests under way and clears the caches: after resume they are recomputed on the new weights."""
        await self._call("POST", "/pause", params={"mode": "keep", "clear_cache": "true"})

    async def reload_weights(self, folder: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._call("POST", "/collective_rpc", json=body)

    async def set_label(self, label: str) -> None:
        await self._call("POST", "/update_weight_version", json={"new_version": label})

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The JSON object of a 200, else Refused or Unreachable."""
        try:
            async with (
                asyncio.timeout(self._request_seconds),
                self._session.request(method, f"{self.url}{path}", **options) as response,
            ):
                text = await response.text(errors="replace")
                if response.status == 200:
                    answer = await response.json(content_type=None) if text.strip() else {}
                    return answer if isinstance(answer, dict) else {}
        except TimeoutError:
            raise Unreachable(f"{path}: no answer within {self._request_seconds:g} s", answered=False) from None
        except aiohttp.ClientError as error:
            raise Unreachable(f"{path}: {type(error).__name__}: {error}", answered=False) from None
        except ValueError:
            raise Unreachable(f"{path}: the answer is not JSON", answered=True) from None
        message = f"{path}: status {response.status}: {text[:MAX_MESSAGE_CHARS]}"
        if 400 <= response.status < 500 and response.status not in (408, 429):
            raise Refused(message)
        raise Unreachable(message, answered=True)

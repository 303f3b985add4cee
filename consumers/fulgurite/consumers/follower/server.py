"""One policy server's weight routes, as vLLM has them under VLLM_SERVER_DEV_MODE=1 and the embedded server as well.

Errors come in two kinds, because they mean different things: Refused (the server answered 4xx: it will say so again)
and Unreachable (no answer, or 5xx: it may be different in a moment). Knows nothing of versions' files or of Kafka.

Which routes there are differs between versions of vLLM and between ways to start it. A route is asked, and 404 means
that this start of the server has none: vLLM's own description, /openapi.json, would say it too, but making it keeps the
server, and every stream it serves, waiting for a second or two.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from fulgurite.schemas.errors import FulguriteError

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS: Final = 500
MAX_ANSWER_BYTES: Final = 64 << 20
"""Larger than any list of checksums, a line for each tensor."""
LOAD_ADAPTER: Final = "/v1/load_lora_adapter"
UNLOAD_ADAPTER: Final = "/v1/unload_lora_adapter"
METRICS: Final = "/metrics"
CHECK_WEIGHTS: Final = "/weight_checker"
LABEL_LOADING: Final = "loading"
"""The label of weights that are being replaced, or how it begins: every load has its own. Not a decimal number: what is
sampled under it has no known version."""


class Refused(FulguriteError):
    """The server answered 4xx: it did not do it and will not."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(FulguriteError):
    """No answer, or 5xx. `answered` says whether the server is there at all."""

    def __init__(self, message: str, *, answered: bool, status: int = 0) -> None:
        super().__init__(message)
        self.answered = answered
        self.status = status


class TimedOut(Unreachable):
    """The connection stands, and nothing came in time."""


@dataclass(frozen=True, slots=True)
class State:
    """What a server says of itself."""

    label: str | None
    """Its weight version: ours are decimal numbers, everything else is nobody's."""
    paused: bool

    @property
    def version(self) -> int | None:
        return int(self.label) if self.label and self.label.isascii() and self.label.isdecimal() else None

    @property
    def whole(self) -> bool:
        """Whether its weights are all of one model, and not what a load left behind that did not come to its end."""
        return not (self.label or "").startswith(LABEL_LOADING)

    @property
    def is_nobodys(self) -> bool:
        """Whether it has weights of its own, as after a start: no version's, nor of a load."""
        return self.version is None and self.whole

    @property
    def held(self) -> bool:
        """Whether it must stay paused until a version was loaded."""
        return self.paused and not self.whole


class PolicyServer:
    """The routes, one method each. Every call takes at most `request_seconds`."""

    def __init__(self, url: str, session: aiohttp.ClientSession, request_seconds: float, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._request_seconds = request_seconds
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._hashes_weights = True
        self._hashes_in_time = True
        self._on_cpu: bool | None = None

    def forget(self) -> None:
        """The server was started anew, or may have been: it may be another version of vLLM, started another way."""
        self._hashes_weights = True
        self._on_cpu = None

    async def state(self) -> State:
        try:
            info = await self._call("GET", "/weight_info")
        except Refused as error:
            raise Refused(f"{error}; vLLM has its weight routes with VLLM_SERVER_DEV_MODE=1", error.status) from None
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

    async def weights_digest(self) -> str | None:
        """One hash over the names and hashes of all tensors that are served, None where the server gives none. Raises
        Unreachable where it is gone."""
        if not self._hashes_in_time or not self._hashes_weights:
            return None
        try:
            found = (await self._call("POST", CHECK_WEIGHTS, json={"action": "checksum"})).get("checksums")
        except (Refused, TimedOut) as error:
            logger.warning("%s cannot hash its weights, and is not asked again: %s", self.url, error)
            self._hashes_weights = False
            if isinstance(error, TimedOut):
                self._hashes_in_time = False  # else it would be paused for as long at every try
            return None
        except Unreachable as error:
            if not error.answered:
                raise
            logger.warning("%s did not hash its weights this time: %s", self.url, error)
            return None
        if not found or not isinstance(found, dict):
            return None
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    async def on_cpu(self) -> bool:
        """Whether it is a vLLM on a CPU, as far as it says so. Asked once: vLLM takes seconds for it."""
        if self._on_cpu is None:
            try:
                config = (await self._call("GET", "/server_info")).get("vllm_config")
            except (Refused, Unreachable):
                config = None
            self._on_cpu = isinstance(config, str) and "device_config=cpu" in config
        return self._on_cpu

    async def models(self) -> dict[str, str]:
        """Every served model's name, and where its files are."""
        found = (await self._call("GET", "/v1/models")).get("data")
        models = [model for model in found if isinstance(model, dict)] if isinstance(found, list) else []
        return {str(model.get("id")): str(model.get("root") or "") for model in models}

    async def metrics(self) -> str:
        """In Prometheus' text format."""
        return await self._request("GET", METRICS)

    async def load_adapter(self, name: str, folder: str) -> None:
        await self._request("POST", LOAD_ADAPTER, json={"lora_name": name, "lora_path": folder})

    async def unload_adapter(self, name: str) -> None:
        """Requests that it serves go on, and need its files (`draining.py`); it is no error that it is not there."""
        try:
            await self._request("POST", UNLOAD_ADAPTER, json={"lora_name": name})
        except Refused as error:
            if error.status != 404:
                raise

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The JSON object of a 200, else Refused or Unreachable."""
        text = await self._request(method, path, **options)
        try:
            answer = json.loads(text) if text.strip() else {}
        except ValueError:
            raise Unreachable(f"{path}: the answer is not JSON", answered=True) from None
        return answer if isinstance(answer, dict) else {}

    async def _request(self, method: str, path: str, **options: Any) -> str:
        """The body of a 200, else Refused or Unreachable."""
        try:
            async with (
                asyncio.timeout(self._request_seconds),
                self._session.request(method, f"{self.url}{path}", headers=self._headers, **options) as response,
            ):
                text = await _text(path, response)
                status = response.status
        except TimeoutError:
            raise TimedOut(f"{path}: no answer within {self._request_seconds:g} s", answered=False) from None
        except aiohttp.ClientError as error:
            raise Unreachable(f"{path}: {type(error).__name__}: {error}", answered=False) from None
        if status == 200:
            return text
        message = f"{path}: status {status}: {text[:MAX_MESSAGE_CHARS]}"
        if 400 <= status < 500 and status not in (408, 429):
            raise Refused(message, status)
        raise Unreachable(message, answered=True, status=status)


async def _text(path: str, response: aiohttp.ClientResponse) -> str:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise Unreachable(f"{path}: the answer is larger than {MAX_ANSWER_BYTES} bytes", answered=True)
    return body.decode(errors="replace")

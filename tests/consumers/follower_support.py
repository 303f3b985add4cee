"""What tests of the follower share: versions with files, a follower's loop, and vLLM's routes that few tests need."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import struct
import tempfile
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fulgurite.consumers.follower.converge import Convergence
from fulgurite.consumers.follower.loading import Shared
from fulgurite.consumers.follower.server import PolicyServer
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings
from fulgurite.schemas.training import VersionApplied
from tests.producers.fake_policy_server import FakePolicyServer


def make_version(
    folder: Path, number: int, *, sha256: str = "", kind: str = "weights", uri: str = "", weights: int | None = None
) -> ResourceVersion:
    """A version whose weights are its number times ten, in `folder`/v<number>, said to be at `uri` (else there)."""
    files = folder / f"v{number}"
    files.mkdir(parents=True, exist_ok=True)
    (files / "weights.txt").write_text(str(number * 10 if weights is None else weights))
    checksum = sha256 or folder_sha256(files)
    return ResourceVersion.model_validate(
        {
            "resource": "policy",
            "version": number,
            "kind": kind,
            "uri": uri or files.as_uri(),
            "sha256": checksum,
            "run_id": "run",
        }
    )


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], fill: int = 0, dtype: str = "U8") -> Path:
    """A safetensors file whose tensors are of these shapes and of one byte."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([fill]) * end)
    return path


def following(server: FakePolicyServer, **settings: Any) -> FollowerSettings:
    """Quick, and with a cache that is not there unless a test names one."""
    quick = {"servers": [server.url], "check_seconds": 0.05, "request_seconds": 2.0}
    cache = Path(tempfile.gettempdir()) / "fulgurite-no-cache"
    return FollowerSettings.model_validate({**quick, "cache_folder": cache, **settings})


class Follower:
    """A follower's process as far as one server goes: what it remembers dies with it, unless `shared` is given."""

    def __init__(
        self,
        server: FakePolicyServer,
        session: aiohttp.ClientSession,
        *known: ResourceVersion,
        shared: Shared | None = None,
        **settings: Any,
    ) -> None:
        self.events: list[VersionApplied] = []
        self.shared = shared or Shared(following(server, **settings))
        self.versions = self.shared.versions
        for version in known:
            self.versions.add(version)
        client = PolicyServer(server.url, session, self.shared.settings.request_seconds)
        self.loop = Convergence(client, self.shared, self._report)

    async def _report(self, event: VersionApplied) -> None:
        self.events.append(event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None]]:
        task = asyncio.create_task(self.loop.run())
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.shared.files.close()

    @property
    def outcome(self) -> list[tuple[int, bool]]:
        return [(event.version, event.ok) for event in self.events]


def vllm_metrics(running: Collection[str], waiting: int) -> str:
    """What vLLM says of its requests, after it has said something else a second before."""
    names = ",".join(sorted(running))
    return f"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="policy"}} {len(running)}.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="policy"}} {waiting}.0
# HELP vllm:num_requests_waiting_by_reason Number of requests waiting to be processed, by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{{engine="0",model_name="policy",reason="capacity"}} 9.0
# HELP vllm:lora_requests_info Running stats on lora requests.
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{{max_lora="1",running_lora_adapters="{names}",waiting_lora_adapters="{names}"}} 1.795e+09
vllm:lora_requests_info{{max_lora="1",running_lora_adapters="policy-v7",waiting_lora_adapters=""}} 1.794e+09
"""


@dataclass
class FakeVllm(FakePolicyServer):
    """With adapters and hashes of weights."""

    adapters: dict[str, str] = field(default_factory=dict)
    routes: tuple[str, ...] = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/weight_checker")
    salt: str = ""
    """Goes into the hash of the weights: a server of another precision, or one with a bit flipped."""
    load_seconds: float = 0.0
    loads: bool = True
    """Whether reload_weights does anything."""
    before_load: Callable[[], object] | None = None
    """Runs when files are about to be read."""
    running: set[str] = field(default_factory=set[str])
    """Adapters that its metrics name."""
    waiting: int = 0
    """Requests whose turn has not come."""

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        found = {
            "/v1/load_lora_adapter": self._load_adapter,
            "/v1/unload_lora_adapter": self._unload_adapter,
            "/weight_checker": self._weight_checker,
        }
        return [("/metrics", "GET", self._metrics), *((path, "POST", found[path]) for path in self.routes)]

    async def restart(self, *, label: str | None = "default", weights: int = 0) -> None:
        await self.stop()  # one that still answers would be given an adapter again
        self.adapters.clear()
        await super().restart(label=label, weights=weights)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(vllm_metrics(self.running, self.waiting))

    async def _models(self, request: Request) -> Response:
        models = {"base": "/models/base"} | self.adapters
        return JSONResponse({"object": "list", "data": [{"id": name, "root": root} for name, root in models.items()]})

    async def _load_adapter(self, request: Request) -> Response:
        asked = await request.json()
        name, path = asked["lora_name"], asked["lora_path"]
        if name in self.adapters:
            return JSONResponse({"error": {"message": f"The lora adapter '{name}' has already been loaded."}}, 400)
        if not await asyncio.to_thread(Path(path).is_dir):
            return JSONResponse({"error": {"message": f"No adapter found for '{name}' at {path}"}}, 404)
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return JSONResponse({"error": {"message": f"The lora adapter '{name}' cannot be found."}}, 404)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _collective_rpc(self, request: Request) -> Response:
        await asyncio.sleep(self.load_seconds)
        if self.before_load:
            self.before_load()
        before = self.weights
        answer = await super()._collective_rpc(request)
        if not self.loads:
            self.weights = before
        return answer

    async def _weight_checker(self, request: Request) -> Response:
        assert (await request.json())["action"] == "checksum"
        digest = hashlib.sha256(f"{self.weights}{self.salt}".encode()).hexdigest()
        return JSONResponse({"checksums": {"dp0:pp0:pcp0:tp0:model.embed_tokens.weight": digest}})


HALF_LOADED = -1


@dataclass
class FragileVllm(FakeVllm):
    """Breaks as vLLM does: a load that fails leaves nothing whole, and going on with that is the end."""

    unreadable: set[str] = field(default_factory=set[str])
    """Names of folders that cannot be loaded."""
    died: bool = False

    async def _collective_rpc(self, request: Request) -> Response:
        folder = Path((await request.json())["kwargs"]["weights_path"])
        if folder.name in self.unreadable:
            self.weights = HALF_LOADED
            return PlainTextResponse("Call to collective_rpc method failed", 500)
        return await super()._collective_rpc(request)

    async def _resume(self, request: Request) -> Response:
        self.died |= self.weights == HALF_LOADED
        return await super()._resume(request)

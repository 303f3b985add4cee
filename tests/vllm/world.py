"""All that stands around vLLM in a run, for one test: broker, gateway (a process), follower, agents, versions."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import openai

from fulgurite.consumers.follower import serve as serve_follower
from fulgurite.infra.ports import free_port
from fulgurite.infra.processes import start_process
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.codec import decode
from fulgurite.schemas.resources import ResourceKind, ResourceVersion
from fulgurite.schemas.settings import FollowerSettings, GatewaySettings, KafkaSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import DEAD_LETTERS, RESOURCES, SPANS, TRAINING
from fulgurite.schemas.training import VersionApplied
from tests.producers.reading import read_topic
from tests.vllm.server import VllmServer

TOLERANCE: Final = 1e-3
"""Of a logprob, to transformers' fp32 forward; seen are 4e-5."""
BACKEND_SECONDS: Final = 300.0
"""A call waits this long for vLLM to come back."""

T = TypeVar("T")

_GATEWAY = """
import json, sys
from fulgurite.producers.gateway import main
from fulgurite.schemas.settings import Settings
sys.exit(main(Settings.model_validate(json.loads(sys.argv[1]))))
"""


@dataclass
class World:
    settings: Settings
    vllm: VllmServer
    url: str
    publisher: Publisher

    async def publish(self, number: int, files: Path, kind: ResourceKind = "weights") -> None:
        """Announces a version, as a trainer does."""
        version = ResourceVersion(
            resource="policy",
            version=number,
            kind=kind,
            uri=files.as_uri(),
            sha256=folder_sha256(files),
            run_id="run",
        )
        await (await self.publisher.publish(RESOURCES, version.resource, version))

    async def serve(self, number: int, files: Path, kind: ResourceKind = "weights") -> VersionApplied:
        """Announces a version and waits until the follower says that it is served."""
        await self.publish(number, files, kind)
        event = await self.reported(number)
        assert event.ok, event.error
        return event

    async def reported(self, number: int) -> VersionApplied:
        """What the follower says became of a version."""

        async def found() -> VersionApplied | None:
            events = [
                decode(VersionApplied, record.value) for record in await read_topic(self.settings.kafka, TRAINING)
            ]
            return next((event for event in events if event.version == number), None)

        return await until(found, f"no report of version {number}")

    def agent(self, rollout_id: str, **options: Any) -> openai.AsyncOpenAI:
        """An agent that knows nothing but its base URL."""
        base = f"{self.url}/rollout/{rollout_id}/attempt/a1/v1"
        return openai.AsyncOpenAI(base_url=base, api_key="none", timeout=BACKEND_SECONDS, **options)

    async def spans(self) -> list[Span]:
        """All on the log."""
        records = await read_topic(self.settings.kafka, SPANS)
        return [decode(Span, line) for record in records for line in (record.value or b"").splitlines()]

    async def half_way(self, requests: int) -> None:
        """Returns when so many are being generated, some tokens in."""

        async def running() -> bool:
            return await self.vllm.metric("vllm:num_requests_running") == requests

        async def some_more() -> bool:
            return await self.vllm.metric("vllm:generation_tokens_total") > started + 20 * requests

        await until(running, f"no {requests} requests run")
        started = await self.vllm.metric("vllm:generation_tokens_total")
        await until(some_more, "nothing is generated")

    async def dead_letters(self) -> int:
        return len(await read_topic(self.settings.kafka, DEAD_LETTERS))


@asynccontextmanager
async def running(kafka: KafkaSettings, vllm: VllmServer, folder: Path, **follower: Any) -> AsyncGenerator[World]:
    """A gateway and a follower before and behind `vllm`; `follower`: its settings."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = Settings(
        kafka=kafka,
        gateway=GatewaySettings(port=port, url=url, backend_url=vllm.url, backend_seconds=BACKEND_SECONDS),
        follower=FollowerSettings(servers=[vllm.url], check_seconds=0.2, cache_folder=folder / "versions", **follower),
    )
    told = json.dumps(json.loads(settings.model_dump_json(include={"kafka", "gateway"})))
    gateway = start_process("gateway", [sys.executable, "-c", _GATEWAY, told], folder / "gateway.log")
    stop = asyncio.Event()
    following = asyncio.create_task(serve_follower(settings, stop))
    try:
        await until(lambda: _well(url), f"the gateway is not well (see {gateway.log})")
        async with Publisher(kafka) as publisher:
            yield World(settings, vllm, url, publisher)
        assert gateway.running, gateway.log_tail(40)
        assert not following.done(), following
    finally:
        stop.set()
        await following
        await asyncio.to_thread(gateway.stop)


async def until(ready: Callable[[], Awaitable[T | None]], why_not: str, seconds: float = 90.0) -> T:
    """The first true thing that `ready` gives."""
    deadline = time.monotonic() + seconds
    while not (found := await ready()):
        assert time.monotonic() < deadline, f"{why_not} within {seconds:g} s"
        await asyncio.sleep(0.05)
    return found


async def _well(url: str) -> bool:
    try:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{url}/health")).status_code == 200
    except httpx.TransportError:
        return False

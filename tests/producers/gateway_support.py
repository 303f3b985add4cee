"""A gateway on a real port, with a publisher whose acknowledgements the test decides."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import openai
from aiokafka.structs import RecordMetadata

from fulgurite.producers.connections import server_of
from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.pool import Pool
from fulgurite.producers.publisher import Acknowledgement
from fulgurite.schemas.codec import encode
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull
from fulgurite.schemas.settings import GatewaySettings
from fulgurite.schemas.spans import Span
from tests.producers.fake_policy_server import until

MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


class FakePublisher:
    """Keeps what it is given; acknowledges at once, or when the test says so, or never."""

    def __init__(self, *, acknowledges: bool = True, max_bytes: int = 1_000_000) -> None:
        self.spans: list[Span] = []
        self.dead: list[DeadLetter] = []
        self.waiting: list[Acknowledgement] = []
        self.acknowledges = acknowledges
        self.max_bytes = max_bytes
        self.full = False

    async def publish_span(self, span: Span) -> Acknowledgement:
        if self.full:
            raise BufferFull("full")
        encode(span, self.max_bytes)
        self.spans.append(span)
        return self._acknowledgement()

    async def publish_dead_letter(self, dead: DeadLetter) -> Acknowledgement:
        self.dead.append(dead)
        return self._acknowledgement()

    def acknowledge(self) -> None:
        for waiting in self.waiting:
            waiting.set_result(RecordMetadata("spans", 0, None, 0, 0, 0, 0))  # type: ignore[arg-type]
        self.waiting.clear()

    def _acknowledgement(self) -> Acknowledgement:
        self.waiting.append(asyncio.get_running_loop().create_future())
        last = self.waiting[-1]
        if self.acknowledges:
            self.acknowledge()
        return last


@asynccontextmanager
async def serving(app: Any, *, grace_seconds: int | None = None, **bounds: Any) -> AsyncGenerator[str]:
    """The app on a free port; gives its URL. At the end calls under way have the grace, then they are cancelled."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = server_of(app, grace_seconds=grace_seconds, **bounds)
    running = asyncio.create_task(server._serve([listener]))  # pyright: ignore[reportPrivateUsage]
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
        listener.close()


async def well() -> str:
    return ""


@asynccontextmanager
async def gateway(
    publisher: FakePublisher, backend_url: str, broker: Any = well, **changes: Any
) -> AsyncGenerator[str]:
    settings = GatewaySettings(backend_url=backend_url, **changes)
    async with Pool(settings) as pool, serving(Gateway(settings, pool, publisher, broker)) as url:
        yield url


def client(url: str, rollout: str = "r1", **options: Any) -> openai.AsyncOpenAI:
    base_url = f"{url}/rollout/{rollout}/attempt/a1/v1"
    return openai.AsyncOpenAI(base_url=base_url, api_key="secret-key", max_retries=0, **options)


async def ask(url: str, **changes: Any) -> Any:
    async with client(url) as agent:
        return await agent.chat.completions.create(model="policy", messages=MESSAGES, **changes)

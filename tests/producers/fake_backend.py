"""A hand-written backend on a free port: answers what it is told to, slowly, badly or not at all, and counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fulgurite.schemas.settings import BackendSettings

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class FakeBackend:
    """Use as an async context manager. `answer` takes the place of a chat completion."""

    name: str = "backend"
    models: list[str] = field(default_factory=lambda: ["policy"])
    label: str | None = "1"
    answer: Answer | None = None
    guard: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
    """May refuse what begins with /v1, as an API key does."""
    health_status: int = 200
    frozen: bool = False
    """Takes connections and answers nothing."""
    port: int = 0
    asked: list[str] = field(default_factory=list)
    """Paths of everything that came, in order."""
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    hung_up: int = 0
    """Completions that the other side did not wait for."""
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> int:
        return self.asked.count("/v1/chat/completions")

    def settings(self, **values: Any) -> BackendSettings:
        return BackendSettings(url=self.url, **values)

    async def __aenter__(self) -> FakeBackend:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._any)
        # A handler is cancelled when its client hangs up, as vLLM's are.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _any(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.frozen:
            return await never(request)
        if request.path == "/health":
            return web.Response(status=self.health_status)
        if self.guard and request.path.startswith("/v1") and (refusal := await self.guard(request)):
            return refusal
        if request.path == "/v1/models":
            return web.json_response(
                {"object": "list", "data": [{"id": name, "root": self.name} for name in self.models]}
            )
        if request.path == "/weight_info" and self.label is not None:
            return web.json_response({"weight_version": self.label})
        if request.method != "POST" or not request.path.startswith(("/v1/", "/tokenize")):
            return web.Response(status=404)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.bodies.append(await request.read())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await (self.answer or self._completion)(request)
        except asyncio.CancelledError:
            self.hung_up += 1
            raise
        finally:
            self.under_way -= 1

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"by": self.name})


def with_status(status: int) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status)

    return answer


async def never(request: web.Request) -> web.StreamResponse:
    """Takes the request and says nothing."""
    await asyncio.sleep(3_600)
    return web.Response()


async def breaks_at_once(request: web.Request) -> web.StreamResponse:
    """Takes the request and dies of it."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()

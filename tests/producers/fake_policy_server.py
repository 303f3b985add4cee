"""A hand-written policy server on a real port: vLLM's routes, tokens that depend on its version, faults on demand.

It speaks the protocol of docs and facts.md 3.3: chat completions with token ids, logprobs and versions; pause, reload,
label, resume. A "model" is a folder with a file `weights.txt` that holds a whole number; every sampled token id is that
number, so a test sees which weights really sampled, whatever the label says. Weights 0 is a server without any.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.producers import fake_answers
from tests.producers.fake_answers import Sampled

Fault = Callable[[], Response | None]


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for something another task does. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (there is no event for an arbitrary condition)
            await asyncio.sleep(0.005)


@dataclass
class FakePolicyServer:
    """Use as an async context manager. `faults[route]` may answer instead of the route; `log` names every call."""

    weights: int = 0
    label: str | None = "default"
    gives_versions: bool = True
    paused: bool = False
    reply_tokens: int = 3
    delay_seconds: float = 0.0
    faults: dict[str, Fault] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    mend: Callable[[dict[str, Any]], Any] = lambda body: body
    """Changes an answer before it goes out: a broken backend."""
    mend_event: Callable[[int, bytes], bytes] = lambda _, event: event
    """The same for the events of a stream, by their number."""
    event_seconds: float = 0.0
    """Pause before each event of a stream but the first."""
    cut_after: int | None = None
    """A stream's connection breaks instead of this event."""
    streams: int = 0
    """Under way."""
    sent_events: int = 0
    hold: tuple[str, int] | None = None
    """(route, n): the nth call of the route from now on is done, but never answered: where a caller is killed."""
    port: int = 0
    _server: uvicorn.Server | None = None
    _running: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        routes = [
            ("/v1/chat/completions", "POST", self._answering(fake_answers.chat, fake_answers.chat_events)),
            ("/v1/completions", "POST", self._answering(fake_answers.completion, fake_answers.completion_events)),
            ("/v1/responses", "POST", self._answering(fake_answers.response, fake_answers.response_events)),
            ("/v1/messages", "POST", self._answering(fake_answers.message, fake_answers.message_events)),
            ("/v1/messages/count_tokens", "POST", self._count_tokens),
            ("/v1/models", "GET", self._models),
            ("/health", "GET", self._health),
            ("/pause", "POST", self._pause),
            ("/resume", "POST", self._resume),
            ("/is_paused", "GET", self._is_paused),
            ("/collective_rpc", "POST", self._collective_rpc),
            ("/update_weight_version", "POST", self._update_weight_version),
            ("/weight_info", "GET", self._weight_info),
            *self.more_routes(),
        ]
        app = Starlette(routes=[Route(path, self._faulty(path, run), methods=[verb]) for path, verb, run in routes])
        config = uvicorn.Config(
            app, host="127.0.0.1", port=self.port, lifespan="off", log_config=None, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._running = asyncio.create_task(self._server._serve())  # pyright: ignore[reportPrivateUsage]
        server = self._server
        await until(lambda: server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        """(path, method, handler) of what a subclass serves besides."""
        return []

    async def stop(self) -> None:
        """As a kill: connections are cut."""
        if self._server and self._running:
            self._server.should_exit = True
            self._server.force_exit = True
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            await self._running
            self._server = None

    async def restart(self, *, label: str | None = "default", weights: int = 0) -> None:
        """As a supervisor does: same port, nothing remembered."""
        await self.stop()
        self.label, self.weights, self.paused = label, weights, False
        await self.start()

    def _faulty(self, path: str, run: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            self.log.append(path)
            fault = self.faults.get(path)
            answer = (fault() if fault else None) or await run(request)
            if self.hold and self.hold[0] == path:
                self.hold = (path, self.hold[1] - 1)
                if self.hold[1] == 0:
                    self.hold = None
                    self.held.set()
                    await asyncio.Event().wait()
            return answer

        return endpoint

    def _answering(
        self, whole: Callable[[Any, Sampled], Any], events: Callable[[Any, Sampled], Iterator[bytes]]
    ) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            asked = await request.json()
            self.requests.append(asked)
            await asyncio.sleep(self.delay_seconds)
            await until(lambda: not self.paused)
            sampled = Sampled([self.weights] * self.reply_tokens, self.label, self.gives_versions)
            if asked.get("stream"):
                return StreamingResponse(self._streamed(events(asked, sampled)), media_type="text/event-stream")
            # json, not orjson: NaN passes, as a broken backend would send it.
            return Response(json.dumps(self.mend(whole(asked, sampled))), media_type="application/json")

        return answer

    async def _streamed(self, events: Iterator[bytes]) -> AsyncGenerator[bytes]:
        self.streams += 1
        try:
            for number, event in enumerate(events):
                if self.cut_after == number:
                    raise ConnectionAbortedError("as a backend that dies")
                if number and self.event_seconds:
                    await asyncio.sleep(self.event_seconds)
                yield self.mend_event(number, event)
                self.sent_events += 1
        finally:
            self.streams -= 1

    async def _count_tokens(self, request: Request) -> Response:
        return JSONResponse({"input_tokens": 4})

    async def _models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": "policy", "object": "model", "created": 1, "owned_by": "t"}]}
        )

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _pause(self, request: Request) -> Response:
        assert request.query_params["mode"] == "keep"
        assert request.query_params.get("clear_cache", "true") == "true"
        self.paused = True
        return JSONResponse({"status": "paused"})

    async def _resume(self, request: Request) -> Response:
        self.paused = False
        return JSONResponse({"status": "resumed"})

    async def _is_paused(self, request: Request) -> Response:
        return JSONResponse({"is_paused": self.paused})

    async def _collective_rpc(self, request: Request) -> Response:
        asked = await request.json()
        assert asked["method"] == "reload_weights"
        assert self.paused, "weights are changed under running requests"
        self.weights = int((Path(asked["kwargs"]["weights_path"]) / "weights.txt").read_text())
        return JSONResponse({"results": [None]})

    async def _update_weight_version(self, request: Request) -> Response:
        if not self.weights:
            return Response("there are no weights to label", status_code=503)
        self.label = (await request.json())["new_version"]
        return JSONResponse({"success": True, "new_version": self.label})

    async def _weight_info(self, request: Request) -> Response:
        return JSONResponse({"weight_version": self.label})

"""A stream of server-sent events that ends its generations when its client hangs up, also while no event is due."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fulgurite.streams.policy_server.answers import Asked
from fulgurite.streams.policy_server.protocol import Json
from fulgurite.streams.policy_server.underway import Underway


class EventStream(Response):
    """`close` is called once, whatever ends the stream. Starlette's StreamingResponse would notice a client that is
    gone at the next event only: over a long pause there is none."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache"})
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._send(send), receive)
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def events(asked: Asked, underway: Underway) -> AsyncIterator[bytes]:
    first = True
    async for delta in underway.deltas():
        if first:
            # Not earlier: who measures the time to the first event measures the prefill.
            for chunk in asked.first_chunks():
                yield _event(chunk)
            first = False
        yield _event(asked.chunk(delta))
    if asked.usage_asked:
        yield _event(asked.usage_chunk())
    yield b"data: [DONE]\n\n"


def _event(chunk: Json) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Whether the work was done; it is cancelled when the client goes away. The request's body was read before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""The gateway's small ASGI tools: headers, bodies within a bound, answers whole or streamed, agents that hang up."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Final

from starlette.types import Message, Receive, Scope, Send

from fulgurite.producers.gateway.errors import ApiError, Headers
from fulgurite.producers.gateway.sse import MEDIA_TYPE
from fulgurite.producers.within import within

DRAIN_BYTES: Final = 64 * 1024 * 1024
"""A refused body is read up to here: a client that is still sending would see a reset instead of the 413."""


class Gone(Exception):
    """The agent closed its connection."""


class Present:
    """A block that ends, raising Gone, when the agent closes its connection meanwhile. After the body was read.

    A call mostly ends with its agent there, so what watches is no task, which would cost more than reading the body
    does: the coroutine is run to its first wait, and on from there when what it waits for has come.
    """

    def __init__(self, receive: Receive) -> None:
        self._watch = _hung_up(receive)
        self._waiting: asyncio.Future[Any] | None = None
        self._gone = False
        self._inside = True

    async def __aenter__(self) -> Present:
        task = asyncio.current_task()
        assert task
        self._task = task
        self._cancelling = task.cancelling()
        self._go_on()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._inside = False
        if self._waiting:
            self._waiting.remove_done_callback(self._go_on)
        self._watch.close()
        if not self._gone:
            return
        # Takes back our own cancellation; somebody else's goes on.
        if self._task.uncancel() <= self._cancelling and (kind is None or kind is asyncio.CancelledError):
            raise Gone from error

    def _go_on(self, _: object = None) -> None:
        if not self._inside:
            return
        try:
            waiting: asyncio.Future[Any] | None = self._watch.send(None)
        except Exception:  # the end of it, or a connection that cannot say any more
            self._waiting = None
            self._gone = True
            self._task.cancel()
            return
        self._waiting = waiting
        if waiting is None:  # it let others go first
            self._task.get_loop().call_soon(self._go_on)
            return
        waiting._asyncio_future_blocking = False  # what a task does with what its coroutine waits for
        waiting.add_done_callback(self._go_on)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A streamed answer, begun with its first bytes. `send` returns when the connection can take more."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self.headers: Headers = []
        """Beside those of any stream."""

    async def send(self, events: bytes, *, last: bool = False) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", MEDIA_TYPE.encode() + b"; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers += self.headers
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})


async def read_body(receive: Receive, headers: dict[str, str], limit: int, deadline: float) -> bytes:
    """The whole body. Raises ApiError: 413 over `limit` bytes, after the client has sent it; 408 where it has not all
    come at the deadline, of the event loop's clock."""
    try:
        left = deadline - asyncio.get_running_loop().time()
        return await within(left, _whole_body(receive, headers, limit))
    except TimeoutError:
        raise ApiError(408, "request_timeout", "the body did not come within the time that the call has") from None


async def _whole_body(receive: Receive, headers: dict[str, str], limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        more = message.get("more_body", False) and size <= DRAIN_BYTES
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    if size > limit:
        said = headers.get("content-length", "more")
        raise ApiError(413, "body_too_large", f"the body is {said} bytes; the bound gateway.max_body_bytes is {limit}")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def headers_of(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def respond(send: Send, status: int, body: bytes, extra: Headers | None = None) -> None:
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(extra or []),
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})

"""One HTTP/1.1 connection to a backend: a request goes out, its answer comes back piece by piece.

What it promises: a head within MAX_HEAD_BYTES; no more of a body in memory than HIGH_BYTES and what one read brings
(then nothing is read until it was taken); an answer that is cut off, or is no HTTP, raises Broken wherever it is waited
for. A connection is used again only after an answer that came whole and lets it be.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, cast

import httptools

MAX_HEAD_BYTES: Final = 64 * 1024
HIGH_BYTES: Final = 256 * 1024
"""Of a body that nobody has taken: then the backend is left waiting."""
PLAIN: Final = "identity"
"""The encoding that is asked for: a compressed stream comes in the compressor's time."""
_KNOWN_ENCODINGS: Final = frozenset({PLAIN, "gzip", "x-gzip", "deflate"})
"""What is read: the others by http_encoding.py."""
_SWITCHING: Final = 101
_FIRST_FINAL: Final = 200


class Broken(Exception):
    """The backend had the request, or some of it, and gave no whole answer; the message is one word, to count by."""


class Response:
    """An answer whose head is known. Close it, unless all of it was read."""

    def __init__(self, connection: Connection, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        """Lower-case names; of several lines the last counts."""
        self._connection: Connection | None = connection
        self._parts: deque[bytes] = deque()
        self._bytes = 0
        self._whole = False
        self._error: Broken | None = None
        self._waiting: asyncio.Future[None] | None = None

    @property
    def at_eof(self) -> bool:
        """Whether all of it came, and was taken."""
        return self._whole and not self._parts

    def read_now(self) -> bytes:
        """What has come; empty where nothing has, or nothing more will. Raises Broken."""
        if not self._parts:
            if self._error:
                raise self._error
            return b""
        data = self._parts.popleft() if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._bytes = 0
        if self._connection:
            self._connection.resume()
        return data

    async def read(self) -> bytes:
        """The same, once something has come; empty at the end."""
        if not (self._parts or self._whole or self._error):
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self.read_now()

    def close(self) -> None:
        """What has not come yet is not wanted: the connection says so to the backend."""
        if self._connection:
            self._connection.abort()

    def feed(self, data: bytes) -> None:
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes > HIGH_BYTES and self._connection:
            self._connection.pause()
        self._wake()

    def end(self, error: Broken | None = None) -> None:
        self._whole, self._error = error is None, error
        self._connection = None  # it may have another answer now
        self._wake()

    def _wake(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


class Connection(asyncio.Protocol):
    """`released` is told when it can be used again, `lost` when it cannot be any more."""

    def __init__(self, released: Callable[[Connection], None], lost: Callable[[Connection], None]) -> None:
        self._released = released
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._head: asyncio.Future[Response] | None = None
        self._response: Response | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._paused = False
        self.free_since = 0.0

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    async def ask(self, request: bytes) -> Response:
        """Its answer, once the head is there. Raises Broken; left by any error it is closed."""
        head = self._head = self._loop.create_future()
        self._transport.write(request)
        try:
            return await head
        except BaseException:
            if head.done() and not head.cancelled() and not head.exception():
                head.result().close()  # it came just then; the connection may be somebody else's by now
            else:
                self.abort()
            raise

    def abort(self) -> None:
        self._transport.abort()

    def pause(self) -> None:
        if not self._paused and self.usable:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.usable:
            self._paused = False
            self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no asyncio class

    def data_received(self, data: bytes) -> None:
        if self._head is None and self._response is None:
            self.abort()  # nobody asked
            return
        try:
            if self._response is None:
                self._head_bytes += len(data)
            self._parser.feed_data(data)
            if self._response is None and self._head_bytes > MAX_HEAD_BYTES:
                self._fail("HeadTooLarge")
        except httptools.HttpParserUpgrade:
            self._fail("SwitchedProtocols")
        except httptools.HttpParserError as error:
            # What a callback of ours raised stands behind the parser's own error.
            reason = error.__context__ if isinstance(error.__context__, Broken) else None
            self._fail(str(reason) if reason else type(error).__name__)

    def connection_lost(self, exc: Exception | None) -> None:
        response, self._response = self._response, None
        head, self._head = self._head, None
        if response is not None:
            until_close = exc is None and not {"content-length", "transfer-encoding"} & response.headers.keys()
            response.end(None if until_close else Broken("ConnectionLost"))
        elif head is not None and not head.done():
            head.set_exception(Broken("ServerDisconnected"))
        self._lost(self)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is not None:
            return  # behind a chunked body: nobody asks for those, and they are not of the next answer
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status, headers = self._parser.get_status_code(), self._headers
        self._headers = {}
        if status < _FIRST_FINAL:
            if status == _SWITCHING:
                raise Broken("SwitchedProtocols")
            return
        if headers.get("content-encoding", PLAIN).lower() not in _KNOWN_ENCODINGS:
            raise Broken("ContentEncoding")
        head, self._head = self._head, None
        if head is None:
            raise Broken("UnaskedAnswer")
        self._response = Response(self, status, headers)
        if not head.done():
            head.set_result(self._response)

    def on_body(self, body: bytes) -> None:
        if self._response:
            self._response.feed(body)

    def on_message_complete(self) -> None:
        response, self._response = self._response, None
        if response is None:  # 100 Continue and the like: the answer is still to come
            return
        self._head_bytes = 0
        keep = self._parser.should_keep_alive() and self.usable
        response.end()
        if keep:
            self.resume()
            self._released(self)
        else:
            self._transport.close()

    def _fail(self, why: str) -> None:
        response, self._response = self._response, None
        head, self._head = self._head, None
        if response is not None:
            response.end(Broken(why))
        elif head and not head.done():
            head.set_exception(Broken(why))
        self.abort()

"""The connections of an HTTP server of ours: how many it has, and how long one of them may ask nothing.

uvicorn bounds neither (its limit_concurrency counts connections once their head has come, and its only time limit ends
with the first byte after an answer), so whoever reaches the port could hold all files of the process with requests that
are never finished, without any key. Promises:

- a connection on which something came, but no request with its whole head, is closed after HEAD_SECONDS: a half-sent
  head, the rest of a body that was refused. So is a new one on which nothing came. How long a body may take is the
  application's business;
- one whose head is larger than MAX_HEAD_BYTES is answered 431 and closed; trailers behind a body are not kept, and one
  with as many bytes of them is closed;
- one that was served and is quiet since stays for KEEP_ALIVE_SECONDS: its client may have it in a pool;
- one that takes nothing of its answers for `stalled_seconds` is closed;
- beyond `most` connections a new one takes the place of the one that has asked nothing for longest, those first that
  never asked at all; where requests are under way on all of them, it is answered 503 at once. So who is inside goes on
  being served, and who floods the server mostly shuts out himself. Both are logged, and told to a `Watch`.

Requests pay next to nothing for that: the connections are looked at once a second. Of uvicorn's protocols it needs
`cycle` and its `response_complete`, `transport`, `timeout_keep_alive_task`, which is there while a served connection is
quiet, `headers`, which are those of the cycle's scope until another head begins, and what its parser calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal

from fulgurite.producers.service import BACKLOG

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

HEAD_SECONDS: Final = 15.0
KEEP_ALIVE_SECONDS: Final = 75
"""Longer than clients and proxies keep a connection that they do not use (httpx 5 s, aiohttp 15, nginx and most load
balancers 60): who closes later is never asked on a connection that he is about to close. uvicorn's own 5 s are no more
than httpx's."""
MAX_CONNECTIONS: Final = 4_096
STALLED_SECONDS: Final = 120.0
RESERVED_FILES: Final = 96
"""For all but connections: Kafka, logs, libraries."""
SEARCH_PAUSE_SECONDS: Final = 1e-5
"""For each open connection, between two searches for those that may go: at most a tenth of the time goes there."""
LOG_EVERY_SECONDS: Final = 5.0
LINGER_SECONDS: Final = 1.0
"""For a client to take its refusal: what it has sent would, unread, have the kernel take the answer back."""
MAX_HEAD_BYTES: Final = 64 * 1024
"""Of a request's head, as far as it comes in parts. uvicorn would keep whatever comes."""
_ANSWER: Final = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%bconnection: close\r\n\r\n%b"
REFUSAL: Final = (
    b'{"error":{"message":"too many connections are open; try again","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)
REFUSED: Final = _ANSWER % (b"503 Service Unavailable", len(REFUSAL), b"retry-after: 1\r\n", REFUSAL)
TOO_LARGE: Final = (
    b'{"error":{"message":"the head of the request is too large","type":"invalid_request_error","param":null,'
    b'"code":"head_too_large"}}'
)
HEAD_TOO_LARGE: Final = _ANSWER % (b"431 Request Header Fields Too Large", len(TOO_LARGE), b"", TOO_LARGE)


class Watch:
    """Who is told what happens at the door; here nobody."""

    def open(self, count: int) -> None:
        """About once a second."""

    def displaced(self) -> None:
        """An idle connection went for a new one."""

    def refused(self) -> None:
        """A new one got no place."""


def server_of(
    app: Any,
    *,
    name: str = "server",
    watch: Watch | None = None,
    lifespan: Literal["on", "off"] = "on",
    max_connections: int = MAX_CONNECTIONS,
    stalled_seconds: float = STALLED_SECONDS,
    grace_seconds: int | None = None,
) -> uvicorn.Server:
    """A server for the app, not begun yet, with as many connections as that, or as the process may open files for. It
    leaves the process's signals alone."""
    import uvicorn

    most, backlog = within_file_limit(max_connections, name)
    lingering = backlog // 8
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan=lifespan,
        ws="none",
        proxy_headers=False,  # who asks is told by keys and ids, never by an address
        timeout_graceful_shutdown=grace_seconds,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=backlog - lingering,
    )
    server = uvicorn.Server(config)
    config.load()
    door = Door(name, server.server_state.connections, most, lingering, stalled_seconds, watch or Watch())
    config.http_protocol_class = _behind(door, config.http_protocol_class)
    tick = server.on_tick

    async def on_tick(counter: int) -> bool:
        """uvicorn's own, ten times a second."""
        if counter % 10 == 0:
            door.look(asyncio.get_running_loop().time())
        return await tick(counter)

    # Not a subclass, which would want uvicorn where this module is imported.
    setattr(server, "on_tick", on_tick)  # noqa: B010
    # run_service has handlers of its own; uvicorn's would replace them.
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010
    return server


def within_file_limit(most: int, name: str = "server") -> tuple[int, int]:
    """(connections, of which so many may be accepted at once): what there are files for, after the soft limit was
    raised as far as it is needed. Each connection may need a second file, for whom its request is handed on to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = RESERVED_FILES + BACKLOG + 2 * most
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (ValueError, OSError):  # a limit of the system's own, on macOS
            pass
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return most, BACKLOG
    usable = max(soft - RESERVED_FILES, 8)
    backlog = min(BACKLOG, usable // 4)
    bound = min(most, (usable - backlog) // 2)
    if bound < most:
        logger.warning(
            "%s: %d connections at most, not %d: the process may open %d files (ulimit -n)", name, bound, most, soft
        )
    return bound, backlog


class Door:
    """Which connections are let in, and which have to go."""

    def __init__(
        self, name: str, connections: set[Any], most: int, lingering: int, stalled_seconds: float, watch: Watch
    ) -> None:
        """`connections`: those that are open, as the server keeps them. `lingering`: most refusals at once that wait
        until they are taken."""
        self._name = name
        self._open = connections
        self._most = most
        self._lingering = lingering
        self._stalled_seconds = stalled_seconds
        self._watch = watch
        self._refusals: dict[Any, asyncio.TimerHandle] = {}
        """Refused connection -> its end."""
        self._idle: dict[Any, tuple[Any, bool, float]] = {}
        """Connection -> the request it had last, if any; whether nothing came since; and since when that is so, as far
        as was seen."""
        self._full: dict[Any, tuple[int, float]] = {}
        """Connection that has not taken all of its answer -> how much waits for it, and since when it is as much."""
        self._next: deque[tuple[Any, Any]] = deque()
        """Those that may have to go for new ones, and the last request that each had."""
        self._searched_at = self._logged_at = float("-inf")
        self._displaced = self._refused = 0
        """Since the last line about them."""

    def lets_in(self, now: float) -> bool:
        """Whether there is room for a new connection; another one may have gone for it."""
        if len(self._open) < self._most:
            return True
        made_room = self._makes_room(now)
        if made_room:
            self._displaced += 1
            self._watch.displaced()
        else:
            self._refused += 1
            self._watch.refused()
        if now - self._logged_at >= LOG_EVERY_SECONDS:
            logger.warning(
                "%s: all %d connections are taken; %d idle ones went for new ones, and %d new ones were refused",
                *(self._name, self._most, self._displaced, self._refused),
            )
            self._logged_at = now
            self._displaced = self._refused = 0
        return made_room

    def _makes_room(self, now: float) -> bool:
        if not self._next and now - self._searched_at >= SEARCH_PAUSE_SECONDS * len(self._open):
            self._searched_at = now
            self.look(now)
            idle = sorted(self._idle.items(), key=lambda each: (each[1][0] is not None, each[1][2]))
            self._next.extend((connection, cycle) for connection, (cycle, _, _) in idle)
        while self._next:
            connection, cycle = self._next.popleft()
            if connection in self._open and connection.cycle is cycle and _is_idle(connection):
                connection.transport.abort()
                return True
        return False

    def entered(self, connection: Any, now: float) -> None:
        self._idle[connection] = (None, False, now)

    def refuse(self, transport: Any) -> None:
        """Answers before anything was asked, and waits a little until that is taken."""
        transport.write(REFUSED)
        if len(self._refusals) < self._lingering and transport.can_write_eof():
            transport.write_eof()
            self._refusals[transport] = asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)
        else:
            transport.close()

    def refusal_over(self, transport: Any) -> None:
        if ending := self._refusals.pop(transport, None):
            ending.cancel()

    def look(self, now: float) -> None:
        """Closes those that have asked nothing, or taken nothing, for too long."""
        self._watch.open(len(self._open))
        self._next.clear()
        idle: dict[Any, tuple[Any, bool, float]] = {}
        full: dict[Any, tuple[int, float]] = {}
        for connection in list(self._open):
            transport = connection.transport
            if size := transport.get_write_buffer_size():
                stands = self._full.get(connection)
                if stands is None or stands[0] != size:
                    stands = (size, now)
                full[connection] = stands
                if now - stands[1] >= self._stalled_seconds:
                    transport.abort()
            elif _is_idle(connection):
                cycle, quiet = connection.cycle, connection.timeout_keep_alive_task is not None
                before = self._idle.get(connection)
                if before is None or before[0] is not cycle or before[1] is not quiet:
                    before = (cycle, quiet, now)
                idle[connection] = before
                if not quiet and now - before[2] >= HEAD_SECONDS:  # uvicorn ends the quiet ones
                    transport.close()
        self._idle, self._full = idle, full


def _is_idle(connection: Any) -> bool:
    """Whether no request is under way there, and all of the last answer was taken."""
    asked = connection.cycle is not None and not connection.cycle.response_complete
    transport = connection.transport
    return not asked and not transport.is_closing() and not transport.get_write_buffer_size()


def _behind(door: Door, protocol: type[Any]) -> type[asyncio.Protocol]:
    is_counted = hasattr(protocol, "on_headers_complete")  # uvicorn's other protocol has bounds of its own

    class Connection(protocol):
        _head_bytes = 0
        """Since a head, a piece of a body or a request was whole: of what the parser keeps until its end comes."""

        def data_received(self, data: bytes) -> None:
            self._head_bytes += len(data)
            super().data_received(data)
            if self._head_bytes > MAX_HEAD_BYTES and is_counted and not self.transport.is_closing():
                if self.cycle is None or self.cycle.response_complete:
                    self.transport.write(HEAD_TOO_LARGE)
                self.transport.close()

        def on_headers_complete(self) -> None:
            self._head_bytes = 0
            super().on_headers_complete()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self.cycle is None or self.cycle.scope["headers"] is not self.headers:
                super().on_header(name, value)  # else it is a trailer, which no application of ours reads

        def on_body(self, body: bytes) -> None:
            self._head_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._head_bytes = 0
            super().on_message_complete()

        def connection_made(self, transport: Any) -> None:
            now = asyncio.get_running_loop().time()
            if door.lets_in(now):
                super().connection_made(transport)
                door.entered(self, now)
            else:
                transport.set_protocol(_Refused(door, transport))
                door.refuse(transport)

    return Connection


class _Refused(asyncio.Protocol):
    """Passes over what comes."""

    def __init__(self, door: Door, transport: Any) -> None:
        self._door = door
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.refusal_over(self._transport)

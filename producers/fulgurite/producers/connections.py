"""The connections of an HTTP server of ours: how many it has, and how long one of them may ask nothing.

uvicorn bounds neither (its limit_concurrency counts connections once their head has come, and its only time limit ends
with the first byte after an answer), so whoever reaches the port could hold all files of the process with requests that
are never finished, without any key. Promises:

- a connection on which no request is under way is closed when none has come with its whole head for HEAD_SECONDS: a
  half-sent head, the rest of a body that was refused. How long a body may take is the application's business;
- one that takes nothing of its answers for `stalled_seconds` is closed;
- beyond `most` connections a new one takes the place of the one that has asked nothing for longest, those first that
  never asked at all; where requests are under way on all of them, it is answered 503 at once. So who is inside goes on
  being served, and who floods the server mostly shuts out himself.

Requests pay nothing for that: the connections are looked at once a second. Of uvicorn's protocols it needs what its own
`Server.shutdown` uses: `cycle`, its `response_complete`, and `transport`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from fulgurite.producers.service import BACKLOG

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

HEAD_SECONDS: Final = 15.0
"""Longest that a connection may be without a request. uvicorn closes one after 5 s on which nothing at all comes."""
MAX_CONNECTIONS: Final = 4_096
STALLED_SECONDS: Final = 120.0
RESERVED_FILES: Final = 96
"""For all but connections: Kafka, logs, libraries."""
SEARCH_PAUSE_SECONDS: Final = 1e-5
"""For each open connection, between two searches for those that may go: at most a tenth of the time goes there."""
LOG_EVERY_SECONDS: Final = 5.0
REFUSAL: Final = (
    b'{"error":{"message":"too many connections are open; try again","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)
REFUSED: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\n"
    b"connection: close\r\n\r\n%b"
) % (len(REFUSAL), REFUSAL)


def server_of(
    app: Any,
    *,
    max_connections: int = MAX_CONNECTIONS,
    stalled_seconds: float = STALLED_SECONDS,
    grace_seconds: int | None = None,
) -> uvicorn.Server:
    """A server for the app, not begun yet, with as many connections as that, or as the process may open files for."""
    import uvicorn

    most, backlog = within_file_limit(max_connections)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        proxy_headers=False,  # who asks is told by keys and ids, never by an address
        timeout_graceful_shutdown=grace_seconds,
        backlog=backlog,
    )
    server = uvicorn.Server(config)
    config.load()
    door = Door(server.server_state.connections, most, stalled_seconds)
    config.http_protocol_class = _behind(door, config.http_protocol_class)
    tick = server.on_tick

    async def on_tick(counter: int) -> bool:
        """uvicorn's own, ten times a second."""
        if counter % 10 == 0:
            door.look(asyncio.get_running_loop().time())
        return await tick(counter)

    setattr(server, "on_tick", on_tick)  # noqa: B010 (a subclass would want uvicorn where this module is imported)
    return server


def within_file_limit(most: int) -> tuple[int, int]:
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
        logger.warning("%d connections at most, not %d: the process may open %d files (ulimit -n)", bound, most, soft)
    return bound, backlog


class Door:
    """Which connections are let in, and which have to go."""

    def __init__(self, connections: set[Any], most: int, stalled_seconds: float) -> None:
        """`connections`: those that are open, as the server keeps them."""
        self._open = connections
        self._most = most
        self._stalled_seconds = stalled_seconds
        self._idle: dict[Any, tuple[Any, float]] = {}
        """Connection -> the request it had last, if any, and since when none is under way, as far as was seen."""
        self._full: dict[Any, tuple[int, float]] = {}
        """Connection that has not taken all of its answer -> how much waits for it, and since when it is as much."""
        self._next: deque[tuple[Any, Any]] = deque()
        """Those that may have to go for new ones, and the last request that each had."""
        self._searched_at = self._logged_at = float("-inf")

    def lets_in(self, now: float) -> bool:
        """Whether there is room for a new connection; another one may have gone for it."""
        if len(self._open) < self._most:
            return True
        if now - self._logged_at >= LOG_EVERY_SECONDS:
            self._logged_at = now
            logger.warning("%d connections are open: the idle ones go for new ones, and more are refused", self._most)
        if not self._next and now - self._searched_at >= SEARCH_PAUSE_SECONDS * len(self._open):
            self._searched_at = now
            self.look(now)
            idle = sorted(self._idle.items(), key=lambda each: (each[1][0] is not None, each[1][1]))
            self._next.extend((connection, cycle) for connection, (cycle, _) in idle)
        while self._next:
            connection, cycle = self._next.popleft()
            if connection in self._open and connection.cycle is cycle and _is_idle(connection):
                connection.transport.abort()
                return True
        return False

    def entered(self, connection: Any, now: float) -> None:
        self._idle[connection] = (None, now)

    def look(self, now: float) -> None:
        """Closes those that have asked nothing, or taken nothing, for too long."""
        self._next.clear()
        idle: dict[Any, tuple[Any, float]] = {}
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
                before = self._idle.get(connection)
                if before is None or before[0] is not connection.cycle:
                    before = (connection.cycle, now)
                idle[connection] = before
                if now - before[1] >= HEAD_SECONDS:
                    transport.close()
        self._idle, self._full = idle, full


def _is_idle(connection: Any) -> bool:
    """Whether no request is under way there, and all of the last answer was taken."""
    asked = connection.cycle is not None and not connection.cycle.response_complete
    return not asked and not connection.transport.get_write_buffer_size()


def _behind(door: Door, protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    class Connection(protocol):
        _refused = False

        def connection_made(self, transport: Any) -> None:
            now = asyncio.get_running_loop().time()
            if door.lets_in(now):
                super().connection_made(transport)
                door.entered(self, now)
            else:
                self._refused = True
                transport.write(REFUSED)
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._refused:
                super().connection_lost(exc)

    return Connection

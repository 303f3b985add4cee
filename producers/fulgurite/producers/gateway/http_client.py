"""The gateway's HTTP client: connections to one origin, kept alive. HTTP/1.1, TLS where the URL says so.

Its own, and small, because a general client costs a third of what the gateway spends on a call: no redirects, cookies
or proxies, which no backend of a gateway needs; no compression is asked for (who compresses all the same is read by
http_encoding.py). A connection that has been free for KEEPALIVE_SECONDS is closed, and never used: the server is about
to close it. Bounds on how many there are at once are the caller's (seats).

Two errors: NotConnected, after which the backend surely has nothing of the request, and Broken (http_connection.py).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Any, Final
from urllib.parse import urlsplit

from fulgurite.producers.gateway.http_connection import Connection, Response
from fulgurite.producers.gateway.http_encoding import Inflated, plain

CONNECT_SECONDS: Final = 5.0
"""For all addresses of a name together."""
NEXT_ADDRESS_SECONDS: Final = 0.25
"""An address that has not answered for so long is not waited for alone (RFC 8305)."""
KEEPALIVE_SECONDS: Final = 4.0
"""Less than vLLM's and uvicorn's 5 s."""
_ALWAYS: Final = "accept: */*\r\naccept-encoding: identity\r\nuser-agent: fulgurite-gateway\r\n"

Address = tuple[Any, ...]


class NotConnected(Exception):
    """No connection; the message is one word, to count by."""


class HttpClient:
    """Of one origin. Close it."""

    def __init__(self, url: str, dropped: Callable[[], None] = lambda: None) -> None:
        """`dropped` is told when the other side closes a connection that is free, sooner than servers do: it ended."""
        self._dropped = dropped
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if tls else 80)
        self._tls = ssl.create_default_context() if tls else None
        self._path = parts.path.rstrip("/")
        self._common = f"host: {parts.netloc}\r\n{_ALWAYS}"
        self._free: deque[Connection] = deque()
        self._used: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._sweeping: asyncio.TimerHandle | None = None

    async def post(self, route: str, body: bytes, authorization: str, more: str = "") -> Response | Inflated:
        """`route` is what comes after the URL, `more` whole lines of the head. Raises NotConnected, Broken."""
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{more}"
        return await self._ask("POST", route, head, authorization, body)

    async def get(self, route: str, authorization: str) -> Response | Inflated:
        return await self._ask("GET", route, "", authorization, b"")

    def close(self) -> None:
        if self._sweeping:
            self._sweeping.cancel()
        for connection in (*self._free, *self._used):
            connection.abort()

    async def _ask(self, method: str, route: str, head: str, authorization: str, body: bytes) -> Response | Inflated:
        login = f"authorization: {authorization}\r\n" if authorization else ""
        text = f"{method} {self._path}{route} HTTP/1.1\r\n{self._common}{head}{login}\r\n"
        connection = self._take() or await self._connect()
        self._used.add(connection)
        return plain(await connection.ask(text.encode("latin-1", "replace") + body))

    def _take(self) -> Connection | None:
        """The one used last: of a quiet gateway's connections the others may go."""
        oldest = self._loop.time() - KEEPALIVE_SECONDS
        while self._free:
            connection = self._free.pop()
            if connection.usable and connection.free_since > oldest:
                return connection
            connection.abort()
        return None

    def _released(self, connection: Connection) -> None:
        self._used.discard(connection)
        connection.free_since = self._loop.time()
        self._free.append(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(KEEPALIVE_SECONDS, self._sweep)

    def _lost(self, connection: Connection) -> None:
        self._used.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
            self._dropped()

    def _sweep(self) -> None:
        """Closes what has been free for too long."""
        self._sweeping = None
        oldest = self._loop.time() - KEEPALIVE_SECONDS
        while self._free and self._free[0].free_since <= oldest:
            self._free.popleft().abort()
        if self._free:
            self._sweeping = self._loop.call_at(self._free[0].free_since + KEEPALIVE_SECONDS, self._sweep)

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                found = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                return await self._first_of(_alternating(found))
        except TimeoutError:
            raise NotConnected("ConnectTimeout") from None
        except (OSError, UnicodeError) as error:  # refused, no such name, a certificate that is not believed
            raise NotConnected(type(error).__name__) from None

    async def _first_of(self, addresses: list[Address]) -> Connection:
        """A connection to the first that answers; each is given a little time before the next is tried too. Raises
        the last one's OSError."""
        trying: set[asyncio.Task[Connection]] = set()
        last: BaseException = OSError("no address")
        try:
            for address in (*addresses, None):
                if address is not None:
                    trying.add(asyncio.create_task(self._open(address)))
                while trying:
                    patience = NEXT_ADDRESS_SECONDS if address is not None else None
                    done, trying = await asyncio.wait(trying, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if not (error := task.exception()):
                            return task.result()
                        last = error
                    if not done:
                        break
            raise last
        finally:
            for task in trying:
                task.add_done_callback(_discard)
                task.cancel()

    async def _open(self, address: Address) -> Connection:
        """To one address, as the host of the URL."""
        ip, port = address[4][:2]
        name = self._host if self._tls else None
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._released, self._lost),
            ip,
            port,
            family=address[0],
            flags=socket.AI_NUMERICHOST,
            ssl=self._tls,
            server_hostname=name,
        )
        return connection


def _alternating(found: list[Address]) -> list[Address]:
    """Of both families in turn, beginning with the one the resolver names first."""
    first = [address for address in found if address[0] == found[0][0]]
    others = [address for address in found if address[0] != found[0][0]]
    return [address for address in chain.from_iterable(zip_longest(first, others)) if address is not None]


def _discard(task: asyncio.Task[Connection]) -> None:
    """One that came too late, or failed."""
    if not task.cancelled() and not task.exception():
        task.result().abort()

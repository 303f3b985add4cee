"""The gateway's HTTP client against servers that write whatever a test says, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from fulgurite.producers.gateway import http_client
from fulgurite.producers.gateway.http_client import HttpClient, NotConnected
from fulgurite.producers.gateway.http_connection import HIGH_BYTES, Broken, Response
from fulgurite.producers.gateway.http_encoding import Inflated
from tests.producers.fake_policy_server import until

Write = Callable[[bytes], Awaitable[None]]


@dataclass
class Server:
    """Answers each request with the next of `answers`; None closes the connection."""

    answers: list[list[bytes | None]]
    url: str = ""
    requests: list[bytes] = field(default_factory=list[bytes])
    connections: int = 0
    closed: int = 0
    written: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.tasks.append(task)
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                for part in self.answers.pop(0):
                    if part is None:
                        return writer.close()
                    writer.write(part)
                    await writer.drain()
                    self.written += len(part)
                    await asyncio.sleep(0.001)
        self.closed += 1
        writer.close()
        return None


@asynccontextmanager
async def serving(*answers: list[bytes | None]) -> AsyncGenerator[tuple[Server, HttpClient]]:
    server = Server(list(answers))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/base"
    client = HttpClient(server.url)
    try:
        yield server, client
    finally:
        client.close()
        listening.close()
        await asyncio.wait(server.tasks)


async def whole(response: Response | Inflated) -> bytes:
    parts: list[bytes] = []
    while part := await response.read():
        parts.append(part)
    assert response.at_eof
    return b"".join(parts)


def sized(body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nX-One: 1\r\n" + more + b"content-length: %d\r\n\r\n" % len(body) + body


async def test_what_is_asked_and_answered_and_that_a_connection_is_used_again():
    async with serving([sized(b"one")], [sized(b"two")]) as (server, client):
        response = await client.post("/v1/chat?x=1", b'{"a":1}', "Bearer k")
        assert (response.status, response.headers["x-one"], await whole(response)) == (200, "1", b"one")
        assert await whole(await client.get("/health", "")) == b"two"
    assert server.connections == 1
    asked, checked = (request.decode().split("\r\n") for request in server.requests)
    assert asked[0] == "POST /base/v1/chat?x=1 HTTP/1.1"
    assert {"authorization: Bearer k", "accept-encoding: identity", "content-type: application/json"} <= set(asked)
    assert asked[-1] == '{"a":1}'
    assert checked[0] == "GET /base/health HTTP/1.1"
    assert not any(line.startswith("authorization") for line in checked)


@pytest.mark.parametrize(
    ("parts", "again"),
    [
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"3\r\nab", b"c\r\n", b"0\r\n\r\n"], True),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", sized(b"abc")], True),
        ([b"HTTP/1.1 200 OK\r\ncontent-len", b"gth: 3\r\n\r", b"\nabc"], True),
        ([sized(b"abc", b"connection: close\r\n")], False),
        ([b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabc"], False),
        ([b"HTTP/1.1 200 OK\r\n\r\nab", b"c", None], False),
    ],
)
async def test_every_way_to_end_an_answer(parts: list[bytes | None], again: bool):
    async with serving(parts, [sized(b"next")]) as (server, client):
        assert await whole(await client.get("/", "")) == b"abc"
        assert await whole(await client.get("/", "")) == b"next"
        assert server.connections == (1 if again else 2)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([None], "ServerDisconnected"),
        ([b"HTTP/1.1 200", None], "ServerDisconnected"),
        ([b"no http at all\r\n\r\n"], "HttpParserError"),
        ([b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000], "HeadTooLarge"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"], "SwitchedProtocols"),
        ([sized(b"abc", b"content-encoding: br\r\n")], "ContentEncoding"),
    ],
)
async def test_what_is_no_answer_is_broken(parts: list[bytes | None], why: str):
    async with serving(parts) as (_, client):
        with pytest.raises(Broken, match=why):
            await client.post("/", b"{}", "")


@pytest.mark.parametrize(
    "parts",
    [
        [sized(b"abc")[:-1], None],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nab", None],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n", b"nonsense\r\n"],
    ],
)
async def test_an_answer_that_is_cut_off_gives_what_came_and_then_breaks(parts: list[bytes | None]):
    async with serving(parts, [sized(b"next")]) as (server, client):
        response = await client.get("/", "")
        assert await response.read() == b"ab"
        with pytest.raises(Broken):
            await response.read()
        response.close()
        assert await whole(await client.get("/", "")) == b"next"
        assert server.connections == 2


async def test_headers_behind_a_body_are_not_of_the_next_answer():
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\ncontent-encoding: gzip\r\n\r\n"
    async with serving([chunked], [sized(b"next")]) as (server, client):
        assert await whole(await client.get("/", "")) == b"abc"
        response = await client.get("/", "")
        assert (await whole(response), response.headers) == (b"next", {"x-one": "1", "content-length": "4"})
        assert server.connections == 1


async def test_an_answer_that_nobody_asked_for_ends_the_connection():
    async with serving([sized(b"one") + sized(b"another")], [sized(b"next")]) as (server, client):
        assert await whole(await client.get("/", "")) == b"one"
        assert await whole(await client.get("/", "")) == b"next"
        assert server.connections == 2


async def test_a_backend_waits_while_nobody_takes_its_answer():
    parts: list[bytes | None] = [b"x" * 65_536] * 256
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (65_536 * 256)
    async with serving([head, *parts]) as (server, client):
        response = await client.get("/", "")
        before = -1
        while server.written > before:  # until the sockets' own buffers are full
            before = server.written
            await asyncio.sleep(0.2)
        assert server.written < 65_536 * 256
        held = len(response.read_now())
        assert HIGH_BYTES < held < 4 * HIGH_BYTES
        assert held + len(await whole(response)) == 65_536 * 256


async def test_who_gives_up_waiting_closes_the_connection():
    async with serving([], [sized(b"next")]) as (server, client):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.post("/", b"{}", ""), 0.05)
        await until(lambda: server.closed == 1)
        assert await whole(await client.get("/", "")) == b"next"


async def test_an_answer_that_is_not_wanted_any_more_closes_the_connection():
    async with serving([sized(b"abc")[:-1], b""], [sized(b"next")]) as (server, client):
        (await client.get("/", "")).close()
        await until(lambda: server.closed == 1)
        assert await whole(await client.get("/", "")) == b"next"


async def test_a_connection_that_was_free_for_long_is_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_client, "KEEPALIVE_SECONDS", 0.05)
    async with serving([sized(b"one")], [sized(b"two")]) as (server, client):
        await whole(await client.get("/", ""))
        await until(lambda: server.closed == 1)
        assert await whole(await client.get("/", "")) == b"two"
        assert server.connections == 2


async def test_who_cannot_be_reached_has_nothing_of_the_request(unused_tcp_port_factory: Any):
    for url, why in (
        (f"http://127.0.0.1:{unused_tcp_port_factory()}", "ConnectionRefusedError"),
        ("http://nowhere.invalid", "gaierror"),
        (f"http://{'x' * 70}.invalid", "UnicodeError|gaierror"),
    ):
        client = HttpClient(url)
        with pytest.raises(NotConnected, match=why):
            await client.get("/", "")
        client.close()


async def test_of_several_addresses_one_that_answers_is_used(monkeypatch: pytest.MonkeyPatch):
    async with serving([sized(b"one")]) as (server, client):
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        loop = asyncio.get_running_loop()
        # 192.0.2.0/24 is nobody's: no answer at all, or a network that says so at once.
        found = [(2, 1, 6, "", (address, port)) for address in ("192.0.2.1", "127.0.0.1")]

        async def resolve(*_: object, **__: object) -> list[Any]:
            return found

        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        async with asyncio.timeout(http_client.CONNECT_SECONDS):
            assert await whole(await client.get("/", "")) == b"one"


def encoded(body: bytes, encoding: bytes, piece_bytes: int = 1_000) -> list[bytes | None]:
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %s\r\ncontent-length: %d\r\n\r\n" % (encoding, len(body))
    return [head, *(body[at : at + piece_bytes] for at in range(0, len(body), piece_bytes))]


NOISE = Random(7).randbytes(40_000)


@pytest.mark.parametrize("piece_bytes", [7, 100_000])
@pytest.mark.parametrize(
    "body", [b"", b"abc", NOISE[:3_000], b"a" * HIGH_BYTES], ids=["empty", "short", "noise", "long"]
)
async def test_what_comes_compressed_without_being_asked_is_read(body: bytes, piece_bytes: int):
    answers: list[list[bytes | None]] = [
        encoded(gzip.compress(body), b"GZIP", piece_bytes),
        encoded(zlib.compress(body), b"deflate", piece_bytes),
        encoded(b"", b"gzip"),
        encoded(body, b"Identity", piece_bytes),
        [sized(b"next")],
    ]
    async with serving(*answers) as (server, client):
        assert [await whole(await client.get("/", "")) for _ in range(5)] == [body, body, b"", body, b"next"]
        assert server.connections == 1


async def test_an_answer_that_grows_is_given_in_pieces_of_a_bounded_size():
    body = b"a" * (40 * HIGH_BYTES)
    async with serving(encoded(gzip.compress(body), b"gzip", 1 << 20)) as (_, client):
        response = await client.get("/", "")
        parts: list[int] = []
        while part := await response.read():
            parts.append(len(part))
            assert not response.at_eof or sum(parts) == len(body)
    assert (sum(parts), max(parts)) == (len(body), HIGH_BYTES)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"abc", "ContentEncoding"),
        (gzip.compress(NOISE)[:-20], "ContentCutOff"),
        (gzip.compress(b"abc") + gzip.compress(b"def"), "ContentEncoding"),
    ],
    ids=["not encoded", "cut off", "two members"],  # the bytes hold the time
)
async def test_what_is_cut_off_within_its_encoding_or_has_none_is_broken(body: bytes, why: str):
    async with serving(encoded(body, b"gzip", 1 << 20)) as (_, client):
        response = await client.get("/", "")
        with pytest.raises(Broken, match=why):
            await whole(response)

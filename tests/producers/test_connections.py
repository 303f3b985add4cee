"""Connections that ask nothing, ask without end or take nothing, and those of agents meanwhile."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fulgurite.producers import connections
from fulgurite.producers.connections import RESERVED_FILES, within_file_limit
from fulgurite.producers.gateway.metrics import Metrics
from fulgurite.producers.service import BACKLOG
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES, serving

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx: "


class Peer:
    """A bare connection."""

    all: ClassVar[list[Peer]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.all.append(self)

    @classmethod
    async def to(cls, url: str, said: bytes = b"") -> Peer:
        peer = cls(*await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])))
        peer.writer.write(said)
        return peer

    async def drip(self) -> None:
        while True:
            self.writer.write(b"a")
            await asyncio.sleep(0.05)

    async def closed_after(self, seconds: float) -> float:
        """How long it took, whatever came until then."""
        began = time.monotonic()
        async with asyncio.timeout(seconds):
            try:
                while await self.reader.read(1 << 16):
                    pass
            except ConnectionError:
                pass
        return time.monotonic() - began


@pytest.fixture(autouse=True)
async def peers() -> AsyncGenerator[None]:
    yield
    for peer in Peer.all:
        peer.writer.close()
        with suppress(ConnectionError):
            await peer.writer.wait_closed()
    Peer.all.clear()


class Slow:
    """An app whose requests last until they are told to end, but for those of /now."""

    def __init__(self) -> None:
        self.running = 0
        self.go_on = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/now", self._now, methods=["GET", "POST"]),
                Route("/slow", self._slow),
                Route("/much", self._much),
            ]
        )

    async def _now(self, request: Request) -> Response:
        return PlainTextResponse("now")

    async def _slow(self, request: Request) -> Response:
        self.running += 1
        await self.go_on.wait()
        return PlainTextResponse("slow")

    async def _much(self, request: Request) -> Response:
        return Response(b"x" * 20_000_000)


@asynccontextmanager
async def slow(**bounds: Any) -> AsyncGenerator[tuple[Slow, str]]:
    server = Slow()
    async with serving(server.app, grace_seconds=0, **bounds) as url:
        yield server, url


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)


async def test_whoever_does_not_come_to_ask_is_let_go(short: None):
    async with (
        slow() as (server, url),
        httpx.AsyncClient(base_url=url, timeout=10) as agent,
        asyncio.TaskGroup() as tasks,
    ):
        waiting = tasks.create_task(agent.get("/slow"))
        await until(lambda: server.running == 1)
        half = await Peer.to(url, HALF)
        # A head on a connection that was served, and a body that nobody wants any more.
        again = await Peer.to(url, b"GET /now HTTP/1.1\r\nhost: a\r\n\r\n" + HALF)
        body = await Peer.to(url, b"POST /now HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\na")
        peers = [half, again, body]
        drips = [tasks.create_task(peer.drip()) for peer in peers]
        assert max(await asyncio.gather(*(peer.closed_after(4) for peer in peers))) >= 0.4
        for drip in drips:
            drip.cancel()
        server.go_on.set()
        assert (await waiting).text == "slow", "longer under way than a head may take"


@pytest.mark.parametrize("before", [b"", b"GET /now HTTP/1.1\r\nhost: a\r\n\r\n"])
async def test_a_head_without_end_is_not_kept(before: bytes):
    async with slow() as (_, url), asyncio.timeout(5):
        peer = await Peer.to(url, before)
        if before:
            await peer.reader.readuntil(b"now")
        peer.writer.write(HALF + b"a" * 8)
        sent = 0
        with suppress(ConnectionError):
            while not peer.reader.at_eof() and sent < 10_000_000:
                peer.writer.write(b"a" * 10_000)
                await peer.writer.drain()
                await asyncio.sleep(0.001)
                sent += 10_000
            assert b" 431 " in await peer.reader.readline()
        assert sent < 1_000_000


async def test_large_bodies_and_heads_in_parts_are_no_large_heads():
    async with slow() as (_, url), asyncio.timeout(10):
        peer = await Peer.to(url)
        for _ in range(3):
            for part in (
                b"POST /now HTTP/1.1\r\nhost: a\r\n",
                b"x: " + b"a" * 20_000 + b"\r\n",
                b"y: " + b"a" * 20_000,
            ):
                peer.writer.write(part)
                await asyncio.sleep(0.02)
            peer.writer.write(b"\r\ncontent-length: 300000\r\n\r\n" + b"b" * 300_000)
            assert b" 200 " in await peer.reader.readuntil(b"\r\n\r\n")
            await peer.reader.readexactly(3)


async def test_a_connection_that_is_used_now_and_then_stays(short: None):
    limits = httpx.Limits(max_connections=1)
    async with slow() as (_, url), httpx.AsyncClient(base_url=url, limits=limits) as agent:
        ports: set[Any] = set()
        for quiet_seconds in (0.3, 0.3, 1.7):  # what a head may take, and a look at all connections
            async with agent.stream("GET", "/now") as response:
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                await response.aread()
            await asyncio.sleep(quiet_seconds)
        assert (await agent.get("/now")).extensions["network_stream"].get_extra_info("client_addr") in ports
    assert len(ports) == 1


async def test_whoever_takes_nothing_of_an_answer_is_let_go():
    async with slow(stalled_seconds=0.5) as (_, url):
        peer = await Peer.to(url, b"GET /much HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(5):
            await peer.reader.readexactly(1)
            transport: Any = peer.writer.transport
            transport.pause_reading()
            await asyncio.sleep(2.7)
            transport.resume_reading()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await peer.reader.readexactly(20_000_000)


async def test_beyond_the_bound_the_longest_idle_goes_and_agents_come_in():
    metrics = Metrics()
    async with (
        slow(max_connections=8, watch=metrics.connections) as (server, url),
        httpx.AsyncClient(base_url=url) as inside,
    ):
        assert (await inside.get("/now")).text == "now"
        waiting = [asyncio.create_task(inside.get("/slow", timeout=10)) for _ in range(2)]
        await until(lambda: server.running == 2)
        halves = [await Peer.to(url, HALF) for _ in range(30)]
        for _ in range(20):
            async with httpx.AsyncClient(base_url=url) as agent:
                assert (await agent.get("/now")).text == "now"
            halves.append(await Peer.to(url, HALF))
        assert await halves[0].closed_after(1) < 1
        await until(lambda: metrics.registry.get_sample_value("fulgurite_gateway_connections") == 8)
        assert (metrics.registry.get_sample_value("fulgurite_gateway_displaced_connections_total") or 0) >= 40
        server.go_on.set()
        assert [(await each).text for each in waiting] == ["slow"] * 2


async def test_where_all_are_busy_a_new_connection_is_refused_at_once(caplog: pytest.LogCaptureFixture):
    metrics = Metrics()
    async with (
        slow(max_connections=4, watch=metrics.connections, name="gateway") as (server, url),
        httpx.AsyncClient(base_url=url, timeout=10) as inside,
    ):
        waiting = [asyncio.create_task(inside.get("/slow")) for _ in range(4)]
        await until(lambda: server.running == 4)
        for _ in range(3):
            refused = await Peer.to(url)
            head, _, body = (await asyncio.wait_for(refused.reader.read(), 1)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b'"code":"too_many_connections"' in body
            refused.writer.close()
        code = {"code": "too_many_connections"}
        assert metrics.registry.get_sample_value("fulgurite_gateway_refused_requests_total", code) == 3
        assert "gateway: all 4 connections are taken" in caplog.text
        server.go_on.set()
        assert [(await each).text for each in waiting] == ["slow"] * 4
        async with httpx.AsyncClient(base_url=url) as agent:
            assert (await agent.get("/now")).text == "now"


async def test_a_refusal_reaches_who_has_sent_his_request_already():
    async with slow(max_connections=1) as (server, url), httpx.AsyncClient(base_url=url, timeout=10) as inside:
        waiting = asyncio.create_task(inside.get("/slow"))
        await until(lambda: server.running == 1)
        # Blocking: the server comes to accept it when all is there.
        sent = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        sent.sendall(b"POST /now HTTP/1.1\r\nhost: a\r\ncontent-length: 60000\r\n\r\n" + b"x" * 50_000)
        peer = Peer(*await asyncio.open_connection(sock=sent))
        assert b"503" in await asyncio.wait_for(peer.reader.readline(), 1)
        peer.writer.write(b"x" * 10_000)
        async with asyncio.timeout(1):
            assert (await peer.reader.read()).endswith(connections.REFUSAL), "no reset"
        silent = await Peer.to(url)
        await silent.reader.read()
        dripping = asyncio.create_task(silent.drip())
        await asyncio.sleep(connections.LINGER_SECONDS + 0.3)
        assert silent.writer.transport.is_closing(), "nor does it last"
        dripping.cancel()
        server.go_on.set()
        await waiting


def test_as_many_connections_as_there_are_files_for(monkeypatch: pytest.MonkeyPatch):
    limit = (256, 256)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert within_file_limit(4_096) == ((160 - 40) // 2, 40)
    assert within_file_limit(16) == (16, 40)
    limit = (256, 1_000_000)
    assert within_file_limit(4_096) == (4_096, BACKLOG)
    assert asked[-1] == (RESERVED_FILES + BACKLOG + 2 * 4_096, 1_000_000)
    limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert within_file_limit(4_096) == (4_096, BACKLOG)


SERVE = """
import asyncio, resource, sys
import uvloop  # as run_service does
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import FakePublisher, gateway
async def main():
    async with gateway(FakePublisher(), sys.argv[1]) as url:
        print(url, flush=True)
        await asyncio.sleep(60)
uvloop.run(main())
"""


async def test_half_sent_heads_do_not_stop_a_gateway_with_few_files():
    async with FakePolicyServer(label="1") as backend:
        run = [sys.executable, "-c", SERVE, backend.url]
        child = await asyncio.create_subprocess_exec(*run, stdout=asyncio.subprocess.PIPE)
        try:
            assert child.stdout
            url = (await child.stdout.readline()).decode().strip()
            halves = [await Peer.to(url, HALF) for _ in range(300)]
            for _ in range(5):
                for half in halves:
                    half.writer.write(b"a")
                halves += [await Peer.to(url, HALF) for _ in range(20)]
                began = time.monotonic()
                async with httpx.AsyncClient(base_url=url) as agent:
                    asked = {"model": "policy", "messages": MESSAGES}
                    assert (await agent.post("/v1/chat/completions", json=asked)).status_code == 200
                assert time.monotonic() - began < 1
        finally:
            child.terminate()
            await child.wait()


async def test_many_agents_keep_their_connections_beside_half_sent_heads():
    async with slow() as (server, url), asyncio.timeout(10):
        for _ in range(50):
            await Peer.to(url, HALF)
        agents = [await Peer.to(url) for _ in range(150)]
        for _ in range(3):
            server.go_on.clear()
            server.running = 0
            for agent in agents:
                agent.writer.write(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n")
            await until(lambda: server.running == len(agents))
            server.go_on.set()
            for agent in agents:
                assert b" 200 OK" in await agent.reader.readuntil(b"slow")


async def test_a_slow_taker_gets_all_of_an_answer(short: None):
    async with slow(stalled_seconds=1.5) as (_, url), asyncio.timeout(10):
        peer = await Peer.to(url, b"GET /much HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        await peer.reader.readuntil(b"\r\n\r\n")
        for _ in range(5):
            assert len(await peer.reader.readexactly(4_000_000)) == 4_000_000
            await asyncio.sleep(0.4)
        assert await peer.reader.read() == b""


@pytest.mark.parametrize("route", ["/now", "/slow"])
@pytest.mark.parametrize("trailers", [b"x: y\r\n", b"x"])
async def test_trailers_are_bounded(route: str, trailers: bytes):
    """Behind a body that has ended, whatever the application does meanwhile; one that never ends is a name."""
    async with slow() as (_, url):
        begin = f"GET {route} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n"
        peer = await Peer.to(url, begin.encode())
        with suppress(ConnectionError):
            for _ in range(16 * connections.MAX_HEAD_BYTES // 8192):  # some may come with the body, uncounted
                peer.writer.write(trailers * (8192 // len(trailers)))
                await peer.writer.drain()
        assert await peer.closed_after(5) < 5


async def test_a_large_body_in_parts_and_trailers_are_taken():
    async with slow() as (_, url):
        peer = await Peer.to(url, b"POST /now HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            peer.writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            await peer.writer.drain()
        peer.writer.write(b"0\r\nsum: 1\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(peer.reader.readline(), 5)

"""Agents that cost next to nothing: HTTP/1.1 by hand on one connection each, for tests/bench/gateway.py."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, cast

import orjson

from tests.bench.gateway_null import EVENTS

ANSWER_SECONDS: Final = 60.0
"""Longest that one answer may take: then the benchmark fails."""
CALLS_A_ROLLOUT: Final = 10

_rollouts = itertools.count(1)


@dataclass
class Timings:
    """Milliseconds, one an answer, without those that the backend was told to wait."""

    first: list[float] = field(default_factory=list[float])
    total: list[float] = field(default_factory=list[float])

    def __iadd__(self, other: Timings) -> Timings:
        self.first += other.first
        self.total += other.total
        return self


def request(path: str, *, stream: bool, pause_ms: int) -> bytes:
    """What an agent sends: a chat completion, as OpenAI's client would ask it."""
    body = orjson.dumps(
        {
            "model": "policy",
            "messages": [{"role": "user", "content": "How much is (37 + 56) * 74? Use the calculator."}],
            "temperature": 1.0,
            "max_tokens": 64,
            "metadata": {"pause_ms": pause_ms},  # a field that any route takes, and that constrains nothing
        }
        | ({"stream": True} if stream else {})
    )
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\ncontent-type: application/json\r\n"
        f"user-agent: bench\r\nx-stainless-retry-count: 0\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Agent(asyncio.Protocol):
    """One connection: asks, and says when the first of the answer came and when the last."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[tuple[float, float]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no asyncio class

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError(f"closed within an answer: {exc}; {bytes(self._read[:500])!r}"))

    async def ask(self, request: bytes, *, stream: bool) -> tuple[float, float]:
        """(seconds to the first token, to the end). Raises where the answer is none."""
        self._stream = stream
        self._read = bytearray()
        self._first = 0.0
        self._size = 0
        self._done = self._loop.create_future()
        self._began = time.perf_counter()
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        self._done = None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._read += data
        if not self._first and (not self._stream or b"data: " in self._read):
            self._first = now
        if self._stream:
            if self._read.endswith(b"0\r\n\r\n"):
                self._finish(now, b"data: [DONE]" in self._read)
        elif not self._size:
            end = self._read.find(b"\r\n\r\n")
            if end >= 0:
                head = bytes(self._read[:end]).lower()
                self._size = end + 4 + int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if not self._stream and self._size and len(self._read) >= self._size:
            self._finish(now, ok=True)

    def _finish(self, now: float, ok: bool) -> None:
        done = self._done
        if done is None or done.done():
            return
        if ok and self._read.startswith(b"HTTP/1.1 200"):
            done.set_result((self._first - self._began, now - self._began))
        else:
            done.set_exception(ConnectionError(f"no answer: {bytes(self._read[:500])!r}"))


class Agents:
    """So many connections to one address, `path` may name a {rollout}, a new one after some calls."""

    def __init__(self, port: int, path: str, count: int) -> None:
        self._port = port
        self._path = path
        self._count = count
        self._agents: list[Agent] = []

    async def __aenter__(self) -> Agents:
        loop = asyncio.get_running_loop()
        for _ in range(self._count):
            _, agent = await loop.create_connection(Agent, "127.0.0.1", self._port)
            self._agents.append(agent)
        return self

    async def __aexit__(self, *_: object) -> None:
        for agent in self._agents:
            agent.close()

    async def ask(self, calls: int, *, stream: bool = False, pause_ms: float = 0.0) -> Timings:
        """`calls` in all. The backend waits before each event for a whole time of its own a call, `pause_ms` on
        average: as calls of a model differ, and lest agents whose answers were recorded together march in step."""
        found = Timings()
        left = iter(range(calls))
        events = EVENTS if stream else 1

        async def work(agent: Agent) -> None:
            await asyncio.sleep(random.uniform(0, pause_ms * events / 1000))  # else a burst is what is measured
            for _, path in zip(left, self._paths(), strict=False):
                pause = round(pause_ms * random.uniform(0.5, 1.5))
                async with asyncio.timeout(ANSWER_SECONDS):
                    first, total = await agent.ask(request(path, stream=stream, pause_ms=pause), stream=stream)
                found.first.append(first * 1000 - pause)
                found.total.append(total * 1000 - pause * events)

        async with asyncio.TaskGroup() as tasks:
            for agent in self._agents:
                tasks.create_task(work(agent))
        return found

    def _paths(self) -> Iterator[str]:
        while True:
            path = self._path.format(rollout=f"rollout-{next(_rollouts)}")
            yield from itertools.repeat(path, CALLS_A_ROLLOUT)

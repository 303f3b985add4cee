"""A materialiser that is told to stop ends within its deadline, whatever does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import httpx
import pytest

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.settings import ClickHouseSettings, Settings
from tests.consumers.test_materialiser_metrics import free_port, ready
from tests.infra.dlq_world import World

STOP_SECONDS = 3


@contextlib.contextmanager
def frozen(pid: int | None) -> Generator[None]:
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def materialiser(world: World, port: int) -> AsyncGenerator[asyncio.subprocess.Process]:
    own = {"materialiser.port": port, "materialiser.stop_seconds": STOP_SECONDS}
    words = [word for name, value in own.items() for word in ("--set", f"{name}={value}")]
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fulgurite.infra", "materialiser", *words),
        env=world.environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


async def assert_ends(child: asyncio.subprocess.Process) -> None:
    """In time, by the deadline, and says so."""
    begun = time.monotonic()
    child.terminate()
    _, said = await asyncio.wait_for(child.communicate(), 30)
    assert time.monotonic() - begun < STOP_SECONDS + 5
    assert (child.returncode, f"has not stopped within {STOP_SECONDS} s" in said.decode()) == (1, True)


@pytest.mark.slow
async def test_with_kafka_frozen(clickhouse_settings: ClickHouseSettings, tmp_path: Path) -> None:
    port = free_port()
    with EmbeddedKafka(tmp_path / "kafka") as kafka:
        await create_topics(kafka.settings())
        world = World(Settings(kafka=kafka.settings(), clickhouse=clickhouse_settings), tmp_path)
        async with materialiser(world, port) as child:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                await ready(http, 200)
            with frozen(kafka.pid):
                await assert_ends(child)


@pytest.mark.slow
async def test_with_clickhouse_frozen_at_the_start(
    settings: Settings, clickhouse_server: EmbeddedClickHouse, tmp_path: Path
) -> None:
    """And until then it says that it lives and is not ready."""
    port = free_port()
    with frozen(clickhouse_server.pid):
        async with (
            materialiser(World(settings, tmp_path), port) as child,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        ):
            assert set(await ready(http, 503)) == {"group"}
            assert (await http.get("/health")).status_code == 200
            await assert_ends(child)

"""What every service does alike: here, how one that cannot listen ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette

from fulgurite.producers.service import run_service, serve_asgi
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.log_settings import LogSettings


def test_a_taken_port_is_one_line_and_exit_code_3(capfd: pytest.CaptureFixture[str], plain_logging: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = run_service(
            "gateway", LogSettings(), lambda stop: serve_asgi(Starlette(), "127.0.0.1", port, stop, "gateway")
        )
    errors = capfd.readouterr().err
    assert code == StartError.exit_code == 3
    assert f"StartError: gateway cannot listen on 127.0.0.1:{port}: " in errors
    assert "(set gateway.port)" in errors
    assert "Traceback" not in errors


async def test_an_app_that_cannot_start_raises_and_one_that_can_serves_until_the_stop(
    unused_tcp_port_factory: Callable[[], int],
) -> None:
    stop, port = asyncio.Event(), unused_tcp_port_factory()

    @asynccontextmanager
    async def broken(_: Starlette) -> AsyncGenerator[None]:
        raise RuntimeError("no")
        yield

    with pytest.raises(StartError, match="gateway could not start"):
        await serve_asgi(Starlette(lifespan=broken), "127.0.0.1", port, stop, "gateway")
    serving = asyncio.create_task(serve_asgi(Starlette(), "127.0.0.1", port, stop, "gateway"))
    await asyncio.sleep(0)  # the port is bound in the first step
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 404
    stop.set()
    await asyncio.wait_for(serving, 5)


@pytest.fixture
def plain_logging() -> Iterator[None]:
    """run_service sets the root logger up for a process of its own; the other tests get theirs back."""
    root, levels = (
        logging.getLogger(),
        {name: logging.getLogger(name).level for name in ("aiokafka", "httpx", "httpx2")},
    )
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)

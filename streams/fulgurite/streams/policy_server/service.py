"""The process: loads the configured model, if there is one, and serves until it is told to stop.

agent ──► gateway ──► routes (app.py) ──► worker.py ──► engine.py ──► forward.py, cache.py
follower ─────────────────┘ pause, reload, version, resume
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import torch
from starlette.applications import Starlette

from fulgurite.producers.service import run_service, serve_asgi
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import Settings
from fulgurite.streams.policy_server.app import create_app
from fulgurite.streams.policy_server.policy import PolicyRefused
from fulgurite.streams.policy_server.worker import Worker

logger = logging.getLogger(__name__)


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Until `stop`. An error of the engine ends it: its supervisor starts it again, the follower loads the weights."""
    own = settings.policy_server
    torch.set_num_threads(own.threads)
    worker = Worker(own.max_waiting_requests)
    if own.model is not None:
        try:
            await worker.reload(own.model)
        except PolicyRefused as error:
            raise StartError(f"policy_server.model: {error}") from error

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        logger.info(
            "ready on %s:%d%s", own.host, own.port, "" if own.model else ", without weights until a version is loaded"
        )
        yield

    ended = asyncio.Event()
    stepping = asyncio.create_task(worker.run())
    stepping.add_done_callback(lambda _: ended.set())
    watching = asyncio.create_task(_either(stop, ended))
    try:
        server_stop = asyncio.Event()
        watching.add_done_callback(lambda _: server_stop.set())
        await serve_asgi(create_app(worker, own, lifespan), own.host, own.port, server_stop, "policy-server")
    finally:
        watching.cancel()
        stepping.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    try:
        await stepping
    except asyncio.CancelledError:
        return


async def _either(first: asyncio.Event, second: asyncio.Event) -> None:
    waits = [asyncio.create_task(first.wait()), asyncio.create_task(second.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def main(settings: Settings) -> int:
    return run_service("policy-server", settings.log, lambda stop: serve(settings, stop))

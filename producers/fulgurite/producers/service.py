"""What every process of ours does alike: a log (logs.py), a stop on SIGTERM or SIGINT, errors that end it with a code,
and for those that serve HTTP how they listen, and how they say how they are.

Promises: `serve` gets an Event that is set once when somebody wants the process to end; when `serve` returns the
process exits with 0; where it has a deadline, a process that has not ended so long after the Event was set ends all the
same, with 1, whatever its tasks and threads wait for; a FulguriteError is logged in one line and ends it with its exit
code; any other error is logged with its traceback and ends it with 1. Does not know what the service does, nor who
restarts it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, Final

from fulgurite.producers.logs import configure_logging
from fulgurite.schemas.errors import FulguriteError, StartError
from fulgurite.schemas.log_settings import LogSettings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from starlette.requests import Request
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

BACKLOG = 1_024
"""Connections that may wait to be accepted: an event loop accepts all of them at once, before it can refuse any."""

GC_THRESHOLDS: Final = (50_000, 20, 100)
"""Objects that are new since the garbage collector last looked, and how many such looks come between thorough ones.
Python's own 700, 10 and 10 are three calls of a gateway, and a tenth of what one fetch of a consumer brings."""

Serve = Callable[[asyncio.Event], Awaitable[None]]


def run_service(name: str, log: LogSettings, serve: Serve, stop_seconds: float | None = None) -> int:
    """Runs `serve` until it returns; gives the exit code. Call it from the main thread. `stop_seconds`: longest that it
    may take to end; for services whose end by it is what a crash is."""
    configure_logging(name, log)
    deadline = threading.Timer(stop_seconds or 0, _end_now, (name, stop_seconds))
    deadline.daemon = True
    try:
        # Its end waits for threads, too.
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_until_stopped(name, serve, deadline if stop_seconds else None))
    except FulguriteError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except Exception:
        logger.exception("%s ended by an unexpected error", name)
        return 1
    finally:
        deadline.cancel()
    logger.info("%s stopped", name)
    return 0


def _end_now(name: str, seconds: float) -> None:
    logger.error("%s has not stopped within %g s, and is ended as it is", name, seconds)
    os._exit(1)


def spare_the_collector() -> None:
    """For a process through which many small objects pass: records, calls. Counting references frees them; looking for
    cycles among them costs up to half of the time that is spent on them, and finds few. What was imported stays, and
    is not looked through again. Call it before `run_service`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (uvicorn's extra brings it): the same loop for a third less of a core."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _until_stopped(name: str, serve: Serve, deadline: threading.Timer | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logger.info("%s starting", name)

    async def ends_in_time() -> None:
        await stop.wait()
        if deadline is not None:
            deadline.start()

    watching = asyncio.create_task(ends_in_time())
    try:
        await serve(stop)
    finally:
        watching.cancel()


def bind(name: str, host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartError when the port is taken, or the host is none of ours.

    Bound before a server starts: uvicorn itself would end the process from within a task.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        section, _, part = name.replace("-", "_").partition(" ")  # of "gateway metrics" it is gateway.metrics_port
        setting = f"{section}.{part}_port" if part else f"{section}.port"
        raise StartError(f"{name} cannot listen on {host}:{port}: {error} (set {setting})") from error
    logger.info("listening on %s:%d", *listener.getsockname()[:2])
    return listener


def metrics_app(registry: CollectorRegistry, not_ready: Callable[[], Collection[str]] | None = None) -> ASGIApp:
    """`/metrics` for Prometheus, `/health`, and `/ready` where it is known what a service that is not ready lacks: 503
    with the reasons, 200 where there are none."""
    from prometheus_client import make_asgi_app
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Mount, Route

    async def health(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def ready(_: Request) -> JSONResponse:
        reasons = not_ready() if not_ready is not None else ()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    routes = [Route("/health", health), Mount("/metrics", make_asgi_app(registry))]
    return Starlette(routes=routes if not_ready is None else [Route("/ready", ready), *routes])


async def serve_asgi(app: Any, host: str, port: int, stop: asyncio.Event, name: str, **bounds: Any) -> None:
    """Serves an ASGI app until `stop`, then lets requests under way finish (5 s), and cancels what is left of them. A
    taken port raises StartError. `bounds`: of its connections, see `connections.server_of`."""
    from fulgurite.producers.connections import server_of

    server = server_of(app, name=name, grace_seconds=5, **bounds)

    async def run(listener: socket.socket) -> None:
        try:
            await server.serve(sockets=[listener])
        except SystemExit as error:  # uvicorn's way to say that the app's lifespan failed; it would end the loop
            raise StartError(f"{name} could not start (see the log above)") from error

    with bind(name, host, port) as listener:
        running = asyncio.create_task(run(listener))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.should_exit = True
            stopping.cancel()
            await running

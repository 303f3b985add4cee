"""The gateway: OpenAI's API for agents, in front of the policy server; every call is recorded before it is answered.

    agent ──OpenAI API──► gateway ──► policy server (vLLM or the embedded one)
                             │
                             └──► topic `spans`, acknowledged by the broker; `dead_letters` for what cannot be recorded

Base URL of an attempt: {gateway.url}/rollout/{rollout_id}/attempt/{attempt_id}/v1. Plain {gateway.url}/v1 works too:
with headers x-rollout-id and x-attempt-id it is the same, without them the call is recorded as a trace of no rollout.

| file | holds |
|---|---|
| `app.py` | the flow of one call and its contract, the routes |
| `calls.py` | what a request may be |
| `backend.py` | asking the policy server, retries, which version sampled |
| `recording.py` | from an answer to spans and dead letters |
| `answers.py` | what the agent gets |
| `errors.py` | refusals and failures in OpenAI's shape |

Keeps nothing that a restart would miss: any number of gateways may run side by side, behind one address.
"""

from __future__ import annotations

import asyncio
import contextlib

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from fulgurite.producers.gateway.app import HEALTH_SECONDS, Gateway
from fulgurite.producers.gateway.backend import Backend
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.service import run_service, serve_asgi
from fulgurite.schemas.settings import KafkaSettings, Settings


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Waits for a broker, then serves until `stop`. Requests under way get 5 s to finish, their spans are flushed."""
    publisher = Publisher(settings.kafka, settings.producer, settings.redaction)
    if not await _started(publisher, stop):
        return
    try:
        async with Backend(settings.gateway) as backend:
            gateway = Gateway(settings.gateway, backend, publisher, lambda: broker_problem(settings.kafka))
            await serve_asgi(gateway.app(), settings.gateway.host, settings.gateway.port, stop, "gateway")
    finally:
        await publisher.close()


async def broker_problem(settings: KafkaSettings) -> str:
    """Empty when a broker answers a metadata request, else what is wrong."""
    client = AIOKafkaClient(**connection_options(settings), request_timeout_ms=int(HEALTH_SECONDS * 1000))
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            await client.bootstrap()
    except (KafkaError, OSError, TimeoutError) as error:
        return type(error).__name__
    finally:
        await client.close()
    return ""


async def _started(publisher: Publisher, stop: asyncio.Event) -> bool:
    """Whether the publisher has a broker; False when somebody wanted to stop before there was one."""
    starting = asyncio.create_task(publisher.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False
    await starting
    return True


def main(settings: Settings) -> int:
    return run_service("gateway", settings.log, lambda stop: serve(settings, stop))

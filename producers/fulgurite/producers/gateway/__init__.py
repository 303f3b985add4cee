"""The gateway: the APIs agents speak, in front of the policy's servers; every call is recorded before it is answered.

    agent ──OpenAI, Anthropic──► gateway ──► backends (vLLM, the embedded server, external providers)
                                    │
                                    └──► topics `spans` and, for what cannot be recorded, `dead_letters`

Base URL of an attempt: {gateway.url}/rollout/{rollout_id}/attempt/{attempt_id}/v1 (for Anthropic's clients without /v1:
they add it). Plain {gateway.url}/v1 works too: with headers x-rollout-id and x-attempt-id, or with the token
fg-<rollout_id>/<attempt_id>, it is the same; without any the call is recorded as a trace of no rollout.

| file | holds |
|---|---|
| `app.py` | the contract, the flow of one call, the routes |
| `streaming.py`, `stream_run.py`, `sse.py` | the flow of a streamed call; server-sent events |
| `calls.py`, `keys.py`, `budgets.py` | who asks, what a request may be, how much one may ask |
| `protocols/` | chat completions, completions, responses, messages: what to ask, how to read it, what to strip |
| `token_flow.py`, `token_asking.py`, `token_route.py`, `token_stream.py` | chat completions by token ids |
| `conversations.py`, `continuation.py`, `turn_ends.py` | with which tokens a conversation goes on |
| `exchange.py`, `asking.py` | what the flow and the pool say to each other |
| `pool.py`, `members.py`, `routing.py`, `places.py`, `breaker.py`, `replica.py`, `labels.py` | who is asked |
| `away.py`, `patience.py` | tries that gave nothing; how long one is waited for |
| `outcome.py`, `tokens.py`, `attributes.py`, `recording.py`, `publishing.py` | from an answer to the log |
| `answers.py`, `errors.py` | refusals and failures in the protocols' shapes |
| `http_client.py`, `http_connection.py`, `http_encoding.py`, `http_exchange.py` | asking a backend over HTTP |
| `http.py`, `passing.py`, `metrics.py`, `health.py` | ASGI's small tools; which headers pass; metrics, /health |

Keeps nothing that a restart would miss but the turns of conversations, which then begin anew: any number of gateways
may run side by side, behind one address that sends a rollout's calls to the same one.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.health import HEALTH_SECONDS
from fulgurite.producers.gateway.keys import ensure_guarded
from fulgurite.producers.gateway.pool import Pool
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.service import run_service, serve_asgi, spare_the_collector
from fulgurite.schemas.settings import GatewaySettings, KafkaSettings, ProducerSettings, Settings

METRICS_CONNECTIONS: Final = 32


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serves until `stop`, from the start: while there is no broker yet, calls wait as they do for one that is away.
    Raises SettingsError when the brokers refuse us. At the stop requests under way get 5 s to finish; what is left of
    them then is ended as interrupted. Their spans are flushed."""
    ensure_guarded(settings.gateway)
    publisher = Publisher(settings.kafka, unlingering(settings.producer), settings.redaction)
    starting = publisher.start_soon()
    starting.add_done_callback(lambda _: stop.set() if _failed(starting) else None)
    try:
        async with Pool(settings.gateway) as pool:
            gateway = Gateway(settings.gateway, pool, publisher, lambda: broker_problem(settings.kafka))
            await _serve_all(gateway, pool, settings.gateway, stop)
    finally:
        await publisher.close()
    if error := _failed(starting):
        raise error


def _failed(task: asyncio.Task[None]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def unlingering(settings: ProducerSettings) -> ProducerSettings:
    """Without a linger, unless one is set: every answer waits for its span, and spans that come while a batch is under
    way are the next one."""
    return settings if "linger_ms" in settings.model_fields_set else settings.model_copy(update={"linger_ms": 0})


async def _serve_all(gateway: Gateway, pool: Pool, settings: GatewaySettings, stop: asyncio.Event) -> None:
    """The gateway, and its metrics where they have a port. A port that is taken ends both, with StartError."""
    # Streams are told sooner that their agent takes nothing.
    bounds: dict[str, Any] = {
        "max_connections": settings.max_connections,
        "stalled_seconds": settings.silence_seconds + 10.0,
        "watch": pool.metrics.connections,
    }
    tasks = {asyncio.create_task(serve_asgi(gateway, settings.host, settings.port, stop, "gateway", **bounds))}
    if settings.metrics_port:
        host, port, app = settings.metrics_host, settings.metrics_port, pool.metrics.app()
        metrics = serve_asgi(app, host, port, stop, "gateway metrics", max_connections=METRICS_CONNECTIONS)
        tasks.add(asyncio.create_task(metrics))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.set()  # only an error ends one of them first
        await asyncio.gather(*tasks)


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


def main(settings: Settings) -> int:
    spare_the_collector()
    return run_service("gateway", settings.log, lambda stop: serve(settings, stop))

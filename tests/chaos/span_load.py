"""A steady load of spans, one a record, of 730 bytes with ten attributes each; it remembers what was acknowledged.

Promises: every span has a name of its own; so many a second as long as the broker takes them, never more to make up for
a delay. Knows nothing of who reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

from aiokafka import AIOKafkaProducer
from aiokafka.structs import RecordMetadata

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas import topics
from fulgurite.schemas.settings import Settings

TICK_SECONDS = 0.05
ROLLOUTS = 199
MOST_UNACKNOWLEDGED = 20_000


class SpanLoad:
    """`run` it, set `stop`; then `places` has every span."""

    def __init__(self, settings: Settings, per_second: float) -> None:
        self._settings = settings
        self._per_tick = max(1, round(per_second * TICK_SECONDS))
        self.stop = asyncio.Event()
        self.places: dict[tuple[str, int, int], int] = {}
        """Topic, partition and offset -> hash of the bytes."""
        self._number = 0
        self._open = 0

    async def run(self) -> None:
        """Until `stop`, and until all that was sent is acknowledged."""
        client = AIOKafkaProducer(
            **connection_options(self._settings.kafka), acks="all", enable_idempotence=True, linger_ms=5
        )
        await client.start()
        try:
            loop = asyncio.get_running_loop()
            at = loop.time()
            while not self.stop.is_set():
                for _ in range(self._per_tick):
                    if self._open < MOST_UNACKNOWLEDGED:
                        await self._send(client)
                at = max(at + TICK_SECONDS, loop.time())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(at):
                        await self.stop.wait()
            await client.flush()
        finally:
            await client.stop()

    async def _send(self, client: AIOKafkaProducer) -> None:
        self._number += 1
        rollout_id = f"rollout-{self._number % ROLLOUTS:04d}"
        value = _span(rollout_id, self._number)
        digest = hash(value)
        self._open += 1

        def acknowledged(sent: asyncio.Future[RecordMetadata]) -> None:
            self._open -= 1
            place = sent.result()
            self.places[place.topic, place.partition, place.offset] = digest

        name = self._settings.kafka.topic(topics.SPANS)
        (await client.send(name, value, key=rollout_id.encode())).add_done_callback(acknowledged)


_TEMPLATE = json.dumps(
    {
        "rollout_id": "{rollout_id}",
        "attempt_id": "{rollout_id}-1",
        "span_id": "{number:016x}",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "name": "execute_tool calculator",
        "kind": "internal",
        "status": "ok",
        "start_ns": 1_795_000_000_000_000_000,
        "end_ns": 1_795_000_000_250_000_000,
        "service": "outage",
        "operation": "execute_tool",
        "attributes": {f"attribute.{number}": f"{number}-{'x' * 18}" for number in range(10)},
    }
).encode()


def _span(rollout_id: str, number: int) -> bytes:
    return _TEMPLATE.replace(b"{rollout_id}", rollout_id.encode()).replace(b"{number:016x}", b"%016x" % number)

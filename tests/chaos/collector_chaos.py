"""A real Collector with the shipped configuration, while it and the broker are killed: is what it accepted delivered?

    python -m tests.chaos.collector_chaos --otelcol dist/otelcol --outage-seconds 20

Needs the binary that infra/collector/builder.yaml builds. Senders post spans, and post them again until the Collector
answers 200: what it answered so is accepted. Meanwhile

    Collector: kill -9, start      broker: kill -9, away, start; in the middle of that the Collector: kill -9, start

Then the log is read to its end and compared: an accepted span that is not there is lost; one that is there twice was
delivered twice, which delivery at least once allows. Exit code 1 when one is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from aiokafka import AIOKafkaConsumer

from fulgurite.consumers.otlp.spans import decode
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.ports import free_port
from fulgurite.infra.topics import create_topics
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings
from tests.consumers.otlp_encoding import record, span

CONFIGURATION = Path(__file__).parents[2] / "infra" / "collector" / "otelcol.yaml"
SENDERS = 4
SPANS_A_REQUEST = 50
PAUSE_SECONDS = 0.02
"""Between two requests of a sender: the broker has to share two cores with the Collector."""
QUIET_SECONDS = 3.0
"""So long nothing more in the log that has all that was accepted, and the Collector has delivered what it has."""
LOST_SECONDS = 60.0
"""So long nothing more, and what is not there is lost: the Collector tries again after 30 seconds at most."""


@dataclass(slots=True)
class Outcome:
    """Spans, by their ids."""

    accepted: set[str] = field(default_factory=set[str])
    delivered: Counter[str] = field(default_factory=Counter[str])
    refused_requests: int = 0
    """Answered with an error, or not at all: sent again."""

    @property
    def lost(self) -> set[str]:
        return self.accepted - self.delivered.keys()

    def __str__(self) -> str:
        twice = sum(1 for count in self.delivered.values() if count > 1)
        return (
            f"accepted {len(self.accepted)}, lost {len(self.lost)}, delivered twice {twice}, "
            f"delivered though never accepted {len(self.delivered.keys() - self.accepted)}, "
            f"requests sent again {self.refused_requests}"
        )


class Collector:
    """One process; its queue outlives it."""

    def __init__(self, binary: Path, brokers: str, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}/v1/traces"
        queue = folder / "queue"
        queue.mkdir(parents=True)
        self._log = folder / "otelcol.log"
        self._command = [str(binary), "--config", str(CONFIGURATION)]
        listen = self.url.removeprefix("http://").removesuffix("/v1/traces")
        own = {"KAFKA_BROKERS": brokers, "OTLP_LISTEN": listen, "COLLECTOR_QUEUE": str(queue)}
        self._environment = os.environ | own
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


async def _send(url: str, sender: int, stop: asyncio.Event, outcome: Outcome) -> None:
    """Until `stop`; what was begun is sent until it is accepted."""
    number = 0
    headers = {"Content-Type": "application/x-protobuf"}
    async with httpx.AsyncClient(timeout=60, headers=headers) as client:
        while not stop.is_set():
            first = number + 1
            number += SPANS_A_REQUEST
            ids = [sender.to_bytes(2, "big") + at.to_bytes(6, "big") for at in range(first, number + 1)]
            body = record(*(span({"note": "x" * 200}, span_id=one, trace=bytes(8) + one) for one in ids))
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.post(url, content=body)).status_code == 200:
                        break
                outcome.refused_requests += 1
                await asyncio.sleep(0.2)
            outcome.accepted.update(one.hex() for one in ids)
            await asyncio.sleep(PAUSE_SECONDS)


async def _disturb(collector: Collector, kafka: EmbeddedKafka, outage_seconds: float) -> None:
    await asyncio.sleep(5)
    await asyncio.to_thread(collector.kill)
    collector.start()
    await asyncio.sleep(5)
    await asyncio.to_thread(kafka.kill)
    await asyncio.sleep(outage_seconds / 2)
    await asyncio.to_thread(collector.kill)
    collector.start()
    await asyncio.sleep(outage_seconds / 2)
    await asyncio.to_thread(kafka.start)
    await asyncio.sleep(5)


async def _read(settings: KafkaSettings, outcome: Outcome) -> None:
    """The whole log, until nothing more comes."""
    consumer = AIOKafkaConsumer(
        settings.otlp_topic,
        **connection_options(settings),
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await consumer.start()
    try:
        newest = time.monotonic()
        while time.monotonic() - newest < (LOST_SECONDS if outcome.lost else QUIET_SECONDS):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                newest = time.monotonic()
                for one in records:
                    outcome.delivered.update(found.span_id for found in decode(one.value or b""))
    finally:
        await consumer.stop()


async def run(binary: Path, folder: Path, outage_seconds: float) -> Outcome:
    """One run; everything it started has ended when it returns."""
    kafka, outcome = EmbeddedKafka(folder / "kafka"), Outcome()
    await asyncio.to_thread(kafka.start)
    settings = kafka.settings()
    await create_topics(settings)
    collector = Collector(binary, settings.bootstrap_servers, folder / "collector")
    collector.start()
    try:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for sender in range(SENDERS):
                group.create_task(_send(collector.url, sender, stop, outcome))
            await _disturb(collector, kafka, outage_seconds)
            stop.set()
        await _read(settings, outcome)
    finally:
        collector.kill()
        await asyncio.to_thread(kafka.stop)
    return outcome


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="collector_chaos")
    parser.add_argument("--otelcol", type=Path, required=True, help="the binary")
    parser.add_argument("--outage-seconds", type=float, default=20.0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(run(given.otelcol, Path(folder), given.outage_seconds))
    sys.stdout.write(f"{outcome}\n")
    return 1 if outcome.lost else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

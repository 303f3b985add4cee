"""What it costs to survive a power failure: inserts a second and produced records a second, with and without fsync.

    .venv/bin/python -m tests.bench.fsync_cost

Rounds with and without alternate, so that whatever else the machine does falls on both; medians are shown.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import clickhouse_connect
from aiokafka import AIOKafkaProducer
from clickhouse_connect.driver import Client

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas import topics
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.retention import RetentionSettings
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.storage import apply_storage

ROUNDS = 5
ROUND_SECONDS = 2.0
ROWS = (1, 1_000, 20_000)
VALUE = b'{"rollout_id":"r","span_id":"s","name":"n","start_ns":1,"end_ns":2,"input":"%s"}' % (b"x" * 700)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="fulgurite-fsync-") as folder:
        _clickhouse(Path(folder))
        asyncio.run(_kafka(Path(folder)))
    return 0


def _clickhouse(folder: Path) -> None:
    with EmbeddedClickHouse(folder / "clickhouse") as engine:
        settings = engine.settings("fsync")
        apply_migrations(settings)
        with clickhouse_connect.get_client(**connection_options(settings), database="fsync") as client:
            for rows in ROWS:
                rates: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(ROUNDS):
                    for fsync, found in rates.items():
                        apply_storage(client, RetentionSettings(), fsync)
                        found.append(_inserts_per_second(client, rows))
                _show(f"ClickHouse, inserts/s of {rows} spans", rates)


def _inserts_per_second(client: Client, rows: int) -> float:
    """Straight into `spans`: what flushing costs, not parsing."""
    insert = (
        "INSERT INTO spans (rollout_id, span_id, name, input, _ts) "
        f"SELECT toString(rand() % 100), hex(rand64()), 'n', randomPrintableASCII(500), now64(3) FROM numbers({rows})"
    )
    client.command("TRUNCATE TABLE spans")
    started, count = time.monotonic(), 0
    while time.monotonic() - started < ROUND_SECONDS:
        client.command(insert)
        count += 1
    return count / (time.monotonic() - started)


async def _kafka(folder: Path) -> None:
    with (
        EmbeddedKafka(folder / "without") as without,
        EmbeddedKafka(folder / "with", fsync=True) as with_fsync,
    ):
        servers = {False: without.settings(KafkaSettings()), True: with_fsync.settings(KafkaSettings())}
        for settings in servers.values():
            await create_topics(settings)
        for at_once, what in ((1, "one after the other"), (1_000, "1,000 at once")):
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(ROUNDS):
                for fsync, found in rates.items():
                    found.append(await _records_per_second(servers[fsync], at_once))
            _show(f"Kafka, acknowledged records/s, {what}", rates)


async def _records_per_second(settings: KafkaSettings, at_once: int) -> float:
    client = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, acks="all", enable_idempotence=True, linger_ms=2
    )
    await client.start()
    try:
        topic = settings.topic(topics.SPANS)
        await client.send_and_wait(topic, VALUE)
        started, count = time.monotonic(), 0
        while time.monotonic() - started < ROUND_SECONDS:
            sent = [
                await client.send(topic, VALUE, partition=number % settings.partitions) for number in range(at_once)
            ]
            await asyncio.gather(*sent)
            count += at_once
        return count / (time.monotonic() - started)
    finally:
        await client.stop()


def _show(what: str, rates: dict[bool, list[float]]) -> None:
    without, with_fsync = statistics.median(rates[False]), statistics.median(rates[True])
    print(f"{what:52s} without {without:9,.1f}  with {with_fsync:9,.1f}  ratio {with_fsync / without:.2f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())

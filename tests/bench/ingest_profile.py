"""Where the CPU of a native span goes between Kafka and the table, stage by stage; docs/ingest-profile.md explains.

    make bench-ingest-profile      or: python tests/bench/ingest_profile.py [--spans 400000] [--block 40000]

The engine's stages are measured by leaving out what comes after: the same blocks go into a database whose view that
parses is gone, then into one that parses and stores nothing, one that stores and does not merge, and a whole one.
The difference of two neighbours is a stage. Python's are called one by one in this process. Prints microseconds of CPU
for each span and writes build/bench/ingest_profile.json.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition

sys.path.insert(0, str(Path(__file__).parent))
from ingest_load import SPANS_A_RECORD, records
from ingest_rig import quiet

from fulgurite.consumers.materialiser.blocks import Partition, Slice, arrow, block
from fulgurite.consumers.materialiser.store import Store
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import SPANS

OUT = Path("build/bench/ingest_profile.json")
PARTITIONS = 4
LEFT_OUT: dict[str, Sequence[str]] = {
    "receive": ("DROP VIEW parse_spans",),
    "parse": ("DROP VIEW spans_mv", "DROP VIEW spans_dead_mv"),
    "store": ("SYSTEM STOP MERGES spans",),
    "merge": (),
}
"""By the last stage that a database does: what is taken away from it."""

Kafka = ConsumerRecord[bytes, bytes]


@dataclass(frozen=True)
class Load:
    """Records of every partition, in the order of the log."""

    parts: list[tuple[Partition, list[Kafka]]]

    def blocks(self, spans: int, fence: str) -> list[list[Slice]]:
        """As the materialiser cuts them: some of every partition."""
        share = spans // SPANS_A_RECORD // len(self.parts)
        longest = max(len(found) for _, found in self.parts)
        return [
            [Slice(part, found[at : at + share], {}, fence) for part, found in self.parts if found[at : at + share]]
            for at in range(0, longest, share)
        ]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def fill(kafka: EmbeddedKafka, spans: int) -> KafkaSettings:
    settings = kafka.settings(KafkaSettings(topic_prefix="profile.", partitions=PARTITIONS))
    await create_topics(settings)
    async with AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, compression_type="lz4", max_batch_size=1 << 20, linger_ms=20
    ) as producer:
        for key, value in records(spans // SPANS_A_RECORD, seed=1):
            await producer.send(settings.topic(SPANS), value, key)
    return settings


async def fetch(settings: KafkaSettings, spans: int) -> tuple[Load, float]:
    """All of it, and the CPU that fetching cost."""
    name = settings.topic(SPANS)
    consumer: AIOKafkaConsumer = AIOKafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers,
        isolation_level="read_committed",
        max_partition_fetch_bytes=8 * 1024 * 1024,
    )
    await consumer.start()
    parts = [TopicPartition(name, number) for number in range(PARTITIONS)]
    consumer.assign(parts)
    await consumer.seek_to_beginning()
    found: dict[TopicPartition, list[Kafka]] = {part: [] for part in parts}
    begun = cpu_seconds(psutil.Process())
    while sum(map(len, found.values())) < spans // SPANS_A_RECORD:
        for part, batch in (await consumer.getmany(timeout_ms=100)).items():
            found[part] += batch
    used = cpu_seconds(psutil.Process()) - begun
    await consumer.stop()
    return Load([(Partition(SPANS, name, part.partition), batch) for part, batch in found.items()]), used


async def insert_all(engine: EmbeddedClickHouse, load: Load, stage: str, block_spans: int) -> tuple[float, float]:
    """CPU seconds of the engine and of this process, until nothing is left to do."""
    settings = engine.settings(f"profile_{stage}")
    apply_migrations(settings)
    store = Store(settings, 60, "profile")
    await store.connect()
    import clickhouse_connect

    with clickhouse_connect.get_client(**connection_options(settings), database=settings.database) as client:
        for statement in LEFT_OUT[stage]:
            client.command(statement)
        blocks = load.blocks(block_spans, await store.fence([part for part, _ in load.parts]))
        process, own = psutil.Process(engine.pid), psutil.Process()
        begun, own_begun = cpu_seconds(process), cpu_seconds(own)
        for slices in blocks:
            await store.insert(slices, store.guard(slices))
        own_used = cpu_seconds(own) - own_begun
        if stage == "merge":
            await asyncio.to_thread(quiet, engine)
        used = cpu_seconds(process) - begun
    await store.close()
    return used, own_used


def timed_blocks(load: Load, block_spans: int) -> dict[str, float]:
    """CPU seconds of making Arrow of everything."""
    made: list[object] = []
    begun = time.process_time()
    tables = [block(slices) for slices in load.blocks(block_spans, "")]
    built = time.process_time()
    for table in tables:
        made = [arrow(table)]
    assert made
    return {"lines and columns": built - begun, "Arrow's stream": time.process_time() - built}


async def measure(folder: Path, spans: int, block_spans: int) -> dict[str, float]:
    with EmbeddedKafka(folder / "kafka") as kafka, EmbeddedClickHouse(folder / "clickhouse") as engine:
        broker = psutil.Process(kafka.pid)
        settings = await fill(kafka, spans)
        begun = cpu_seconds(broker)
        load, fetched = await fetch(settings, spans)
        seconds = {"Kafka: serve fetches": cpu_seconds(broker) - begun, "Python: fetch": fetched}
        python = timed_blocks(load, block_spans)
        seconds |= {f"Python: {name}": used for name, used in python.items()}
        before = 0.0
        for number, stage in enumerate(LEFT_OUT):
            used, own = await insert_all(engine, load, stage, block_spans)
            if number == 0:
                seconds["Python: send"] = own - sum(python.values())
            seconds[f"ClickHouse: {stage}"] = used - before
            before = used
    return {name: 1e6 * used / spans for name, used in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, default=400_000)
    parser.add_argument("--block", type=int, default=40_000, help="spans of an insert")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fulgurite-profile-") as folder:
        figures = asyncio.run(measure(Path(folder), options.spans, options.block))
    print("microseconds of CPU a span:")
    for name, figure in figures.items():
        print(f"  {name:32s} {figure:8.2f}")
    print(f"  {'together':32s} {sum(figures.values()):8.2f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()

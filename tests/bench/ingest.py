"""From Kafka to a queryable row: how fast, at what cost, next to the engine's own ceiling and the naive way.

    make bench-ingest            or: python tests/bench/ingest.py [--spans 2000000] [--otlp-spans 400000]
                                     [--without single otlp naive]

In one run, on one broker and one engine started for it: (a) ceiling: prebuilt Arrow straight into the table, two
inserts at a time; (b) native spans, newline-delimited; single: one span a record; (c) OTLP; (d) naive: a model a
message, rows of tuples; queryable: from produce to queryable at half of (b)'s rate, beside what rate the producer kept.
Prints a table and writes build/bench/ingest.json. The topic is filled before the materialiser starts, so a run is a
backlog being worked off; the broker's reading is part of it, producing is not (but in the latency part it is). What a
start with nothing to do costs, measured before, is taken off; everything else counts. A part begins when the engine has
merged what earlier parts left.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from aiokafka import AIOKafkaConsumer, TopicPartition
from clickhouse_connect.driver import Client

sys.path.insert(0, str(Path(__file__).parent))
from ingest_load import SPANS_A_RECORD, otlp_records, records
from ingest_rig import PARTITIONS, Cost, Rig, make_rig, processes, quiet, start_up

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.schemas.codec import decode
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import OTLP_SPANS, SPANS

OUT = Path("build/bench/ingest.json")
BLOCK_RECORDS = 460
"""Of the ceiling's inserts: about what the materialiser makes of its 32 MiB."""
BLOCK_ROWS = BLOCK_RECORDS * SPANS_A_RECORD
ASK_SECONDS = 0.1
"""A question takes 11 ms of the engine's CPU, which is missing where it is measured."""
TRACKED = 10
"""One record of so many is waited for, until it can be queried."""
Part = Callable[[str, Callable[[], dict[str, float]]], dict[str, float]]
"""Measures under a name, prints and keeps the figures."""

COLUMNS = """
SELECT name FROM system.columns
WHERE table = 'spans' AND database = currentDatabase() AND default_kind != 'ALIAS' ORDER BY position
"""
NAIVE = """
CREATE TABLE naive (
    rollout_id String, span_id String, name String, start_ns Int64, end_ns Int64, attributes Map(String, String)
) ENGINE = MergeTree ORDER BY (rollout_id, start_ns)
"""
BYTES = """
SELECT sum(bytes_on_disk) / sum(rows) FROM system.parts
WHERE active AND database = currentDatabase() AND table = 'spans'
"""


def count(client: Client) -> int:
    return int(client.query("SELECT count() FROM spans").result_rows[0][0])


def work_off(rig: Rig, client: Client, spans: int, start: dict[str, float]) -> dict[str, float]:
    """The materialiser on a full topic: rate and cost until all is there, without those of its start."""
    before, begun = count(client), time.monotonic()
    with rig.materialiser() as child:
        cost = Cost(processes(rig, child))
        try:
            while (there := count(client) - before) < spans:
                time.sleep(0.05)
                if time.monotonic() - begun > 600 or child.poll() is not None:
                    raise SystemExit(f"only {there} of {spans} spans arrived")
            seconds = time.monotonic() - begun - start["seconds"]
            used = cost.end()
        finally:
            child.terminate()
            child.wait(30)
    figures = {f"{name}_cpu_seconds_per_million": 1e6 * (value - start[name]) / spans for name, value in used.items()}
    figures["cpu_seconds_per_million"] = sum(figures.values())
    figures["spans_per_second"] = spans / seconds
    figures["peak_rss_mib"] = cost.peak_rss_bytes / 2**20
    return figures


def ceiling(rig: Rig, client: Client, spans: int) -> dict[str, float]:
    """Blocks of Arrow made of the very rows, each once and ordered as the table is, into a table of the same shape."""
    client.command("CREATE TABLE ceiling AS spans")
    names = [row[0] for row in client.query(COLUMNS).result_rows]
    blocks = [
        client.raw_query(
            f"SELECT {', '.join(names)} FROM spans WHERE _partition = {partition} AND _offset >= {low} "
            f"AND _offset < {low + BLOCK_RECORDS} ORDER BY rollout_id, attempt_id, start_ns, span_id",
            fmt="ArrowStream",
            settings={"output_format_arrow_compression_method": "none", "max_block_size": BLOCK_ROWS},
        )
        for low in range(0, spans // SPANS_A_RECORD // PARTITIONS, BLOCK_RECORDS)
        for partition in range(PARTITIONS)
    ]
    one_block = {"min_insert_block_size_rows": 2**40, "min_insert_block_size_bytes": 2**40, "async_insert": 0}

    def insert(block: bytes) -> None:
        with rig.client() as own:
            own.raw_insert("ceiling", names, block, fmt="ArrowStream", settings={**one_block, "max_threads": 1})

    cost = Cost({"clickhouse": psutil.Process(rig.clickhouse.pid), "client": psutil.Process()})
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(insert, blocks))
    seconds, used = time.monotonic() - begun, sum(cost.end().values())
    inserted = int(client.query("SELECT count() FROM ceiling").result_rows[0][0])
    client.command("DROP TABLE ceiling")
    return {"spans_per_second": inserted / seconds, "cpu_seconds_per_million": 1e6 * used / inserted}


def naive(rig: Rig, client: Client, spans: int) -> dict[str, float]:
    """What one writes first: consume, a pydantic model a message, rows of Python values, inserts of a thousand."""
    client.command(NAIVE)

    async def run() -> float:
        name = rig.settings.kafka.topic(SPANS)
        consumer: AIOKafkaConsumer = AIOKafkaConsumer(
            bootstrap_servers=rig.settings.kafka.bootstrap_servers, auto_offset_reset="earliest"
        )
        await consumer.start()
        consumer.assign([TopicPartition(name, number) for number in range(PARTITIONS)])
        rows: list[list[Any]] = []
        done, begun = 0, time.monotonic()
        while done < spans:
            record = await consumer.getone()
            for line in (record.value or b"").split(b"\n"):
                found = decode(Span, line)
                rows.append(
                    [found.rollout_id, found.span_id, found.name, found.start_ns, found.end_ns, found.attributes]
                )
            if len(rows) >= 1_000:
                client.insert("naive", rows, settings={"async_insert": 0})
                done, rows = done + len(rows), []
        seconds = time.monotonic() - begun
        await consumer.stop()
        return done / seconds

    return {"spans_per_second": asyncio.run(run())}


class Steady:
    """Produces at a steady rate, in a thread of its own; remembers when it wanted to send every TRACKED-th record."""

    def __init__(self, rig: Rig, spans_per_second: float, seconds: float) -> None:
        self._rig = rig
        self._load = list(records(int(spans_per_second * seconds / SPANS_A_RECORD), seed=9))
        self._every_seconds = SPANS_A_RECORD / spans_per_second
        self.tracked: deque[tuple[int, int, float]] = deque()
        """(partition, offset, when), of what the broker has."""
        self.spans_per_second = 0.0
        """At the end: what came of the rate that was asked for."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._produce()))

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    async def _produce(self) -> None:
        # As cheap as it can be, since it runs beside what is measured: aiokafka's lz4 takes 13 times as long as snappy.
        async with self._rig.producer(linger_ms=20, compression="snappy") as producer:
            begun = time.monotonic()
            for number, (key, value) in enumerate(self._load):
                due = begun + number * self._every_seconds
                if (ahead := due - time.monotonic()) > 0.001:
                    await asyncio.sleep(ahead)
                sent = await producer.send(self._rig.settings.kafka.topic(SPANS), value, key)
                if number % TRACKED == 0:
                    sent.add_done_callback(lambda done, due=due: self._remember(done.result(), due))
            self.spans_per_second = len(self._load) * SPANS_A_RECORD / (time.monotonic() - begun)

    def _remember(self, sent: Any, due: float) -> None:
        self.tracked.append((sent.partition, sent.offset, due))


def latency(rig: Rig, client: Client, spans_per_second: float, seconds: float) -> dict[str, float]:
    """From when a record should have been sent, whether or not the producer was late, until SQL finds its spans. Asks
    every ASK_SECONDS how far each partition is; waiting to ask, and for the answer, counts too. What is asked is cheap:
    a partition's records become visible in their order, and the newest parts say how far that is."""
    waits = Waits()
    with rig.materialiser() as child:
        time.sleep(8)
        deadline = time.monotonic() + 5 * seconds + 60
        with Steady(rig, spans_per_second, seconds) as steady:
            while (not steady.over or steady.tracked or waits.open) and time.monotonic() < deadline:
                time.sleep(ASK_SECONDS)
                waits.add(steady.tracked)
                waits.ask(client)
        child.terminate()
        child.wait(30)
    if waits.open:
        raise SystemExit(f"{waits.open} of {waits.open + len(waits.seconds)} records did not become queryable")
    found = sorted(waits.seconds)
    return {
        "p50_seconds": statistics.median(found),
        "p99_seconds": found[int(len(found) * 0.99)],
        "produced_spans_per_second": steady.spans_per_second,
    }


class Waits:
    """Records that were sent, and how long it took until a question found them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._open: dict[int, deque[tuple[int, float]]] = {number: deque() for number in range(PARTITIONS)}

    @property
    def open(self) -> int:
        return sum(map(len, self._open.values()))

    def add(self, tracked: deque[tuple[int, int, float]]) -> None:
        while tracked:
            partition, offset, due = tracked.popleft()
            self._open[partition].append((offset, due))

    def ask(self, client: Client) -> None:
        oldest = {number: waiting[0][0] for number, waiting in self._open.items() if waiting}
        for number, there in how_far(client, oldest).items():
            waiting = self._open[number]
            while waiting and waiting[0][0] <= there:
                self.seconds.append(time.monotonic() - waiting.popleft()[1])


def how_far(client: Client, oldest: dict[int, int]) -> dict[int, int]:
    """Of each of these partitions, the last offset that SQL finds, where it finds this one or a later."""
    if not oldest:
        return {}
    where = " OR ".join(f"(_partition = {number} AND _offset >= {offset})" for number, offset in oldest.items())
    rows = client.query(f"SELECT _partition, max(_offset) FROM spans WHERE {where} GROUP BY 1").result_rows
    return {int(number): int(offset) for number, offset in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, default=2_000_000)
    parser.add_argument("--otlp-spans", type=int, default=400_000)
    parser.add_argument("--single-spans", type=int, default=300_000)
    parser.add_argument("--latency-seconds", type=float, default=20)
    parser.add_argument("--without", nargs="*", default=[], choices=["single", "otlp", "naive", "queryable"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fulgurite-bench-") as folder:
        kafka, clickhouse = EmbeddedKafka(Path(folder, "kafka")), EmbeddedClickHouse(Path(folder, "clickhouse"))
        with kafka, clickhouse:
            figures = run(kafka, clickhouse, options)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))
    print(f"\nwritten to {OUT}")


def run(kafka: EmbeddedKafka, clickhouse: EmbeddedClickHouse, options: argparse.Namespace) -> dict[str, float]:
    def rig(name: str) -> Rig:
        return make_rig(name, kafka, clickhouse)

    figures: dict[str, float] = {}

    def part(name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        print(f"{name} …", flush=True)
        quiet(clickhouse)
        found = measure()
        for key, value in found.items():
            print(f"  {key:42s} {value:14,.1f}" if value >= 10 else f"  {key:42s} {value:14.3f}", flush=True)
            figures[f"{name}_{key}"] = value
        return found

    native = rig("native")
    with native.client() as client:
        lines = list(records(200, seed=1))
        figures["span_bytes"] = sum(len(value) for _, value in lines) / (200 * SPANS_A_RECORD) - 1
        print(f"filling the topic with {options.spans:,} spans of {figures['span_bytes']:.0f} bytes …", flush=True)
        start = start_up(native)
        native.fill(SPANS, records(options.spans // SPANS_A_RECORD, seed=1))
        b = part("native", lambda: work_off(native, client, options.spans, start))
        size = client.query(BYTES).result_rows
        figures["bytes_per_span"] = float(size[0][0])
        a = part("ceiling", lambda: ceiling(native, client, min(options.spans, 1_000_000)))
        if "naive" not in options.without:
            part("naive", lambda: naive(native, client, 20_000))
        if "queryable" not in options.without:
            half = b["spans_per_second"] / 2
            part("queryable", lambda: latency(native, client, half, options.latency_seconds))
    if "single" not in options.without:
        one_a_record(rig("single"), part, options.single_spans)
    if "otlp" not in options.without:
        collected(rig("collector"), part, options.otlp_spans)
    figures["native_share_of_ceiling"] = a["cpu_seconds_per_million"] / b["cpu_seconds_per_million"]
    figures["peak_rss_mib"] = b["peak_rss_mib"]
    for name in ("native_share_of_ceiling", "bytes_per_span", "peak_rss_mib"):
        print(f"{name:44s} {figures[name]:14.2f}")
    return figures


def one_a_record(single: Rig, part: Part, spans: int) -> None:
    start = start_up(single)
    with single.client() as client:
        single.fill(
            SPANS,
            ((key, line) for key, value in records(spans // SPANS_A_RECORD, seed=2) for line in value.split(b"\n")),
        )
        part("single", lambda: work_off(single, client, spans, start))


def collected(otlp: Rig, part: Part, spans: int) -> None:
    start = start_up(otlp)
    with otlp.client() as client:
        otlp.fill(OTLP_SPANS, otlp_records(spans // SPANS_A_RECORD, seed=3))
        part("otlp", lambda: work_off(otlp, client, spans, start))


if __name__ == "__main__":
    main()

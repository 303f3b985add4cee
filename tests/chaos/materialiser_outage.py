"""ClickHouse away for minutes under load: what it costs is lag, and this counts whether it cost anything else.

    make chaos-outage ARGS="--outage-seconds 300 --rate 2000"

An embedded Kafka and ClickHouse in a temporary folder, one `fulgurite materialiser` with its default settings, a
producer of one span a record at a steady rate (span_load.py). ClickHouse is killed (-9), stays away, is started again;
the producer never rests. Once the lag is what it was before, the producer stops and log and tables are compared
(ledger.py).

    before        outage                                          catching up            compared
    ├─ warm up ──┼─ kill -9 ───────────────────── start again ──┼─ lag as before ──────┤

Lag is what the materialiser tells Prometheus, memory what the kernel says of its process. Exit code 1 when a span is
lost, doubled or changed, when there is a dead letter, or when the materialiser ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.ports import free_port
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.settings import KafkaSettings, MaterialiserSettings, Settings
from tests.chaos.consumers import Consumers
from tests.chaos.ledger import Audit, audit
from tests.chaos.outcome import conclude, say
from tests.chaos.span_load import SpanLoad

PARTITIONS = 4
SAMPLE_SECONDS = 0.5
REPORT_SECONDS = 20.0
START_SECONDS = 60.0
"""Longest that the first spans may take to their table."""
SETTLED_LAG_SECONDS = 2.0
"""Caught up: no more records wait than come in this time. Some always do: batches wait for company."""
MIB = 1024 * 1024

Say = Callable[[str], None]


@dataclass(slots=True)
class Seen:
    """The materialiser over a stretch of time."""

    lag_records: int = 0
    """Last seen."""
    peak_lag_records: int = 0
    peak_rss_bytes: int = 0
    cpu_seconds: float = 0.0
    """Of its process, since it started."""

    def begin_anew(self) -> None:
        """Peaks are from now on."""
        self.peak_lag_records = self.peak_rss_bytes = 0


@dataclass(slots=True)
class Result:
    """What happened; `build/bench/outage.json`."""

    rate: float = 0.0
    seconds_down: float = 0.0
    """From the kill until ClickHouse answers again."""
    published_during: int = 0
    published: int = 0
    peak_lag_records: int = 0
    rss_before_bytes: int = 0
    rss_during_bytes: int = 0
    rss_after_bytes: int = 0
    cpu_seconds_during: float = 0.0
    catch_up_seconds: float = 0.0
    ended: list[str] = field(default_factory=list[str])
    audit: Audit = field(default_factory=Audit)
    dead_letters: int = 0

    @property
    def passed(self) -> bool:
        return self.audit.clean and not self.dead_letters and not self.ended

    def figures(self) -> dict[str, float]:
        return {
            "spans_per_second": round(self.rate),
            "seconds_down": round(self.seconds_down, 1),
            "published_during_outage": self.published_during,
            "published": self.published,
            "peak_lag_records": self.peak_lag_records,
            "rss_before_mib": round(self.rss_before_bytes / MIB),
            "peak_rss_during_outage_mib": round(self.rss_during_bytes / MIB),
            "peak_rss_catching_up_mib": round(self.rss_after_bytes / MIB),
            "cpu_seconds_during_outage": round(self.cpu_seconds_during, 1),
            "catch_up_seconds": round(self.catch_up_seconds, 1),
            "lost": self.audit.lost + self.audit.lost_by_kafka,
            "duplicated": self.audit.duplicated,
            "wrong": self.audit.wrong,
            "dead_letters": self.dead_letters,
            "ended_by_itself": len(self.ended),
        }


async def run_outage(
    folder: Path, outage_seconds: float, rate: float, warm_up_seconds: float, settle_seconds: float, say: Say
) -> Result:
    """All of it, in this folder. A lag that is not gone after settle_seconds ends it, and counts as loss."""
    kafka, clickhouse = EmbeddedKafka(folder / "kafka"), EmbeddedClickHouse(folder / "clickhouse")
    try:
        await asyncio.gather(asyncio.to_thread(kafka.start), asyncio.to_thread(clickhouse.start))
        settings = Settings(
            kafka=kafka.settings(KafkaSettings(topic_prefix="outage.", partitions=PARTITIONS)),
            clickhouse=clickhouse.settings("outage"),
            materialiser=MaterialiserSettings(port=free_port()),
        )
        await create_topics(settings.kafka)
        outage = _Outage(settings, clickhouse, folder, rate, say)
        try:
            return await outage.run(outage_seconds, warm_up_seconds, settle_seconds)
        finally:
            await outage.consumers.stop()
    finally:
        await asyncio.gather(asyncio.to_thread(clickhouse.stop), asyncio.to_thread(kafka.stop))


class _Outage:
    """One run: its parts, and its steps in `run`."""

    def __init__(self, settings: Settings, clickhouse: EmbeddedClickHouse, folder: Path, rate: float, say: Say) -> None:
        self.consumers = Consumers(settings, folder)
        self._settings = settings
        self._clickhouse = clickhouse
        self._load = SpanLoad(settings, rate)
        self._rate = rate
        self._say = say
        self._seen = Seen()
        self._started = time.monotonic()

    async def run(self, outage_seconds: float, warm_up_seconds: float, settle_seconds: float) -> Result:
        result = Result(rate=self._rate)
        self.consumers.add()
        loading = asyncio.create_task(self._load.run())
        watching = [asyncio.create_task(work) for work in (self.consumers.watch(), self._sample(), self._report())]
        try:
            await self._until_lag(START_SECONDS)
            await asyncio.sleep(warm_up_seconds)
            result.rss_before_bytes = self._seen.peak_rss_bytes
            await self._be_away(outage_seconds, result)
            result.catch_up_seconds = await self._until_lag(settle_seconds)
            result.peak_lag_records = max(result.peak_lag_records, self._seen.peak_lag_records)
            result.rss_after_bytes = self._seen.peak_rss_bytes
            self._load.stop.set()
            await loading
            await self._until_lag(settle_seconds, most=0)
            result.published = len(self._load.places)
        finally:
            for task in (loading, *watching):
                task.cancel()
            await asyncio.gather(loading, *watching, return_exceptions=True)
        await self.consumers.stop()
        self._tell("comparing log and tables")
        result.ended = self.consumers.ended
        result.audit = await audit(self._settings, self._load.places)
        result.dead_letters = int(await asyncio.to_thread(self._clickhouse.command, _DEAD_LETTERS))
        return result

    async def _be_away(self, seconds: float, result: Result) -> None:
        published, cpu_seconds = len(self._load.places), self._seen.cpu_seconds
        await asyncio.to_thread(self._clickhouse.kill)
        self._tell("ClickHouse is killed")
        self._seen.begin_anew()
        killed = time.monotonic()
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self._clickhouse.start)
        result.seconds_down = time.monotonic() - killed
        result.published_during = len(self._load.places) - published
        result.cpu_seconds_during = self._seen.cpu_seconds - cpu_seconds
        result.peak_lag_records, result.rss_during_bytes = self._seen.peak_lag_records, self._seen.peak_rss_bytes
        self._seen.begin_anew()
        self._tell("ClickHouse is back")

    async def _until_lag(self, seconds: float, most: float | None = None) -> float:
        """How long it took until no more records wait than usual; -1, a lag that nobody tells, is not that."""
        most = SETTLED_LAG_SECONDS * self._rate if most is None else most
        started = time.monotonic()
        await asyncio.sleep(2 * SAMPLE_SECONDS)
        while not 0 <= self._seen.lag_records <= most and time.monotonic() - started < seconds:  # noqa: ASYNC110
            await asyncio.sleep(SAMPLE_SECONDS)
        return time.monotonic() - started

    async def _sample(self) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                for pid in self.consumers.pids:
                    with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself: told at the end
                        self._look_at(psutil.Process(pid))
                self._seen.lag_records = await self._lag(client)
                self._seen.peak_lag_records = max(self._seen.peak_lag_records, self._seen.lag_records)
                await asyncio.sleep(SAMPLE_SECONDS)

    def _look_at(self, process: psutil.Process) -> None:
        times = process.cpu_times()
        self._seen.cpu_seconds = times.user + times.system
        self._seen.peak_rss_bytes = max(self._seen.peak_rss_bytes, process.memory_info().rss)

    async def _lag(self, client: httpx.AsyncClient) -> int:
        """Over all partitions; -1 while nobody says."""
        try:
            answer = await client.get(f"http://127.0.0.1:{self._settings.materialiser.port}/metrics/")
        except httpx.TransportError:
            return -1
        samples = [
            sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.name == "fulgurite_materialiser_lag_records"
        ]
        return int(sum(samples)) if samples else -1

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            seen = self._seen
            self._tell(
                f"{len(self._load.places):,} published; lag {seen.lag_records:,}; "
                f"peak RSS {seen.peak_rss_bytes // MIB:,} MiB; CPU {seen.cpu_seconds:.0f} s"
            )

    def _tell(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._started:5.0f} s  {text}")


_DEAD_LETTERS = "SELECT count() FROM outage.dead_letters FORMAT TabSeparated"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make chaos-outage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--outage-seconds", type=float, default=300.0, help="ClickHouse is away (default 300)")
    parser.add_argument("--rate", type=float, default=2_000.0, help="spans a second (default 2000)")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds before the outage (default 20)")
    parser.add_argument("--settle", type=float, default=600.0, help="longest that catching up may take (default 600 s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench/outage.json"), help="where the figures go")
    chosen = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="fulgurite-outage-"))
    result = asyncio.run(run_outage(folder, chosen.outage_seconds, chosen.rate, chosen.warm_up, chosen.settle, say))
    return conclude(result, folder, chosen.out, "lag, and nothing else")


if __name__ == "__main__":
    sys.exit(main())

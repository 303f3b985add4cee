"""A long run of the materialiser under everything that may go wrong, and a count of what it lost or doubled.

    make chaos ARGS="--seconds 600 --seed 7"

An embedded Kafka and ClickHouse in a temporary folder, one to three `fulgurite materialiser` of one group, a producer
that never rests (ledger.py). A schedule made of the seed alone kills (-9) materialisers, engine and broker, freezes
materialisers for longer than their session (zombies), adds and removes some. Then everything is left in peace, what is
in the log is waited for, and log and tables are compared. Same seed: same disturbances at the same times; which
instruction they meet is the machine's business. Exit code 1 when a line is lost, doubled or changed, or a materialiser
ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.settings import KafkaSettings, MaterialiserSettings, Settings
from tests.chaos.consumers import Consumers
from tests.chaos.ledger import Audit, Producer, ask, audit, ends
from tests.chaos.outcome import conclude, say

MATERIALISER = MaterialiserSettings(batch_wait_ms=50, insert_seconds=4, session_seconds=6)
"""Short limits: a zombie is one after six seconds, not 45."""
MOST_CONSUMERS = 3
PARTITIONS = 4
WEIGHTS = {
    "kill materialiser": 4,
    "kill clickhouse": 3,
    "kill kafka": 1,
    "freeze materialiser": 2,
    "add materialiser": 2,
    "remove materialiser": 2,
}
PAUSE_SECONDS = (0.5, 4.0)
"""Between two disturbances."""
AWAY_SECONDS = (0.0, 3.0)
"""How long what was killed stays away."""
OVERTIME_SECONDS = (1.0, 4.0)
"""How much longer than its session a materialiser is frozen."""
REPORT_SECONDS = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Disturbance:
    at_seconds: float
    what: str
    pick: float
    """Which of those that run, as a share of them."""
    seconds: float
    """How long it is away or frozen."""


def schedule(seed: int, seconds: float) -> list[Disturbance]:
    """Of the seed alone. Each kind comes once before chance decides."""
    rand = random.Random(f"schedule {seed}")
    first = sorted(WEIGHTS)
    rand.shuffle(first)
    found: list[Disturbance] = []
    at = 1.0
    while at < seconds:
        what = first.pop() if first else rand.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        frozen = MATERIALISER.session_seconds + rand.uniform(*OVERTIME_SECONDS)
        away = rand.uniform(*AWAY_SECONDS)
        found.append(Disturbance(at, what, rand.random(), frozen if what.startswith("freeze") else away))
        at += rand.uniform(*PAUSE_SECONDS)
    return found


class Chaos:
    """Stores, consumers and what is done to them."""

    def __init__(self, kafka: EmbeddedKafka, clickhouse: EmbeddedClickHouse, consumers: Consumers) -> None:
        self._stores: dict[str, EmbeddedKafka | EmbeddedClickHouse] = {"kafka": kafka, "clickhouse": clickhouse}
        self._consumers = consumers
        self._away: set[str] = set()
        self.done: Counter[str] = Counter()

    async def run(self, plan: Sequence[Disturbance]) -> None:
        """Every disturbance at its time, whatever else is away then; returns when all of them are over."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for disturbance in plan:
                await asyncio.sleep(max(0.0, started + disturbance.at_seconds - time.monotonic()))
                group.create_task(self._do(disturbance))

    async def _do(self, disturbance: Disturbance) -> None:
        verb, what = disturbance.what.split()
        if what in self._stores:
            await self._kill_store(disturbance.what, self._stores[what], disturbance.seconds)
        elif verb == "kill":
            await self._kill_consumer(disturbance)
        elif verb == "freeze" and len(self._consumers):
            self.done[disturbance.what] += 1
            await self._consumers.freeze(disturbance.pick, disturbance.seconds)
        elif verb == "add" and len(self._consumers) < MOST_CONSUMERS:
            self.done[disturbance.what] += 1
            self._consumers.add()
        elif verb == "remove" and len(self._consumers) > 1:
            self.done[disturbance.what] += 1
            await asyncio.to_thread(self._consumers.take(disturbance.pick).stop)

    async def _kill_store(self, name: str, store: EmbeddedKafka | EmbeddedClickHouse, seconds: float) -> None:
        if name in self._away:
            return
        self.done[name] += 1
        self._away.add(name)  # until clients can use it again
        await asyncio.to_thread(store.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(store.start)
        self._away.discard(name)

    async def _kill_consumer(self, disturbance: Disturbance) -> None:
        if len(self._consumers):
            self.done[disturbance.what] += 1
            await asyncio.to_thread(self._consumers.take(disturbance.pick).kill)
            await asyncio.sleep(disturbance.seconds)
            if len(self._consumers) < MOST_CONSUMERS:
                self._consumers.add()


@dataclass(frozen=True, slots=True)
class Result:
    """What happened; `build/bench/chaos.json`."""

    seed: int
    seconds: float
    """Of disturbance."""
    settle_seconds: float
    """From the last one until everything was there."""
    done: Counter[str]
    unknown: int
    ended: list[str]
    audit: Audit

    @property
    def kills(self) -> int:
        return sum(count for what, count in self.done.items() if what.startswith("kill"))

    @property
    def passed(self) -> bool:
        return self.audit.clean and not self.ended

    def figures(self) -> dict[str, float]:
        audited = self.audit
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "settle_seconds": round(self.settle_seconds, 1),
            "kills": self.kills,
            **{f"{what.replace(' ', '_')}s": self.done[what] for what in WEIGHTS},
            "records": audited.records,
            "unacknowledged": self.unknown,
            "lines": audited.lines,
            "dead_letters": audited.dead_letters,
            "lost": audited.lost + audited.lost_by_kafka,
            "duplicated": audited.duplicated,
            "wrong": audited.wrong,
            "ended_by_themselves": len(self.ended),
        }


async def run_chaos(
    folder: Path, seed: int, seconds: float, records_per_second: float, settle_seconds: float, say: Say
) -> Result:
    """All of it, in this folder. What is not in the tables settle_seconds after the last disturbance is lost."""
    kafka, clickhouse = EmbeddedKafka(folder / "kafka"), EmbeddedClickHouse(folder / "clickhouse")
    try:
        await asyncio.gather(asyncio.to_thread(kafka.start), asyncio.to_thread(clickhouse.start))
        settings = Settings(
            kafka=kafka.settings(KafkaSettings(topic_prefix="chaos.", partitions=PARTITIONS)),
            clickhouse=clickhouse.settings("chaos"),
            materialiser=MATERIALISER,
        )
        await create_topics(settings.kafka)
        await asyncio.to_thread(apply_migrations, settings.clickhouse)  # on a busy machine it takes longer than a life
        consumers = Consumers(settings, folder)
        chaos = Chaos(kafka, clickhouse, consumers)
        producer = Producer(settings, seed, records_per_second)
        try:
            return await _disturbed(settings, consumers, chaos, producer, seed, seconds, settle_seconds, say)
        finally:
            await consumers.stop()
    finally:
        await asyncio.gather(asyncio.to_thread(clickhouse.stop), asyncio.to_thread(kafka.stop))


async def _disturbed(
    settings: Settings,
    consumers: Consumers,
    chaos: Chaos,
    producer: Producer,
    seed: int,
    seconds: float,
    settle_seconds: float,
    say: Say,
) -> Result:
    for _ in range(2):
        consumers.add()
    watching = asyncio.create_task(consumers.watch())
    saying = asyncio.create_task(_progress(chaos, consumers, producer, say))
    producing = asyncio.create_task(producer.run())
    try:
        started = time.monotonic()
        await chaos.run(schedule(seed, seconds))
        disturbed_seconds = time.monotonic() - started
        producer.stop.set()
        await producing
        say(f"{disturbed_seconds:5.0f} s  left in peace: waiting until {len(producer.places):,} records are there")
        started = time.monotonic()
        await _settle(settings, producer, settle_seconds)
        settled_seconds = time.monotonic() - started
        await asyncio.sleep(1)  # whatever is still on its way arrives, and shows as a duplicate
    finally:
        for task in (watching, saying, producing):
            task.cancel()
        await asyncio.gather(watching, saying, producing, return_exceptions=True)
    await consumers.stop()
    found = await audit(settings, producer.places)
    return Result(seed, disturbed_seconds, settled_seconds, chaos.done, producer.unknown, consumers.ended, found)


async def _settle(settings: Settings, producer: Producer, seconds: float) -> None:
    """Until nothing is missing any more, or the time is up: then it is lost."""
    deadline = time.monotonic() + seconds
    wanted = {(part.topic, part.partition): end for part, end in (await ends(settings)).items() if end}
    sql = "SELECT topic, partition, records FROM reconciliation"
    there: dict[tuple[str, int], int] = {}
    while any(there.get(part, 0) < end for part, end in wanted.items()) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        there = {(name, number): count for name, number, count in await asyncio.to_thread(ask, settings, sql)}
    # Every record is in a table; now those of which only one of two tables has its part.
    while (await audit(settings, producer.places)).lost and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(2)


async def _progress(chaos: Chaos, consumers: Consumers, producer: Producer, say: Say) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        done = ", ".join(f"{what} {count}" for what, count in sorted(chaos.done.items()))
        passed = time.monotonic() - started
        say(f"{passed:5.0f} s  {len(producer.places):,} acknowledged; {len(consumers)} run; {done}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=180.0, help="of disturbance (default 180)")
    parser.add_argument("--seed", type=int, default=1, help="of schedule and records (default 1)")
    parser.add_argument("--rate", type=float, default=200.0, help="records a second, of 6 lines each (default 200)")
    parser.add_argument("--settle", type=float, default=300.0, help="longest wait at the end (default 300 s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench/chaos.json"), help="where the figures go")
    chosen = parser.parse_args(arguments)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it says every try at a broker that is away
    folder = tempfile.mkdtemp(prefix="fulgurite-chaos-")
    result = asyncio.run(run_chaos(Path(folder), chosen.seed, chosen.seconds, chosen.rate, chosen.settle, say))
    return conclude(result, Path(folder), chosen.out, "exactly once")


if __name__ == "__main__":
    sys.exit(main())

"""How fast the questions people ask are answered: from the tables and views as they ship, on 10 million spans.

    make bench-queries           or: python tests/bench/queries.py [--spans 300000]

An engine of its own in a temporary folder is filled by queries_load.py, then asked, each question with 20 different
arguments (or as often, where it has none; fewer, but three at least, where that takes more than ten seconds):
ingested: right after the inserts, in as many parts as they left, merges stopped; settled: after merging, warm; cold:
settled, but before each question the engine forgets what it cached and the kernel the files' pages. Times are those of
the client, over HTTP; CPU is the engine's, warm. ClickHouse's cache of conditions is off: a question asked again would
look better than a new one. Prints a table and writes build/bench/queries.json.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import clickhouse_connect
import psutil
from clickhouse_connect.driver import Client
from clickhouse_connect.driver.query import QueryResult

sys.path.insert(0, str(Path(__file__).parent))
from queries_asked import QUESTIONS, Question
from queries_load import SPANS_A_ROLLOUT, Load

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.trace import rollout_tree
from fulgurite.schemas.migrations import apply_migrations, connection_options

OUT = Path("build/bench/queries.json")
ARGUMENTS = 20
MAX_SECONDS = 10.0
"""Of one question in one state, once it was asked MIN_TIMES."""
MIN_TIMES = 3
MAX_MERGE_SECONDS = 600.0
CACHES = ("MARK", "UNCOMPRESSED", "INDEX MARK", "INDEX UNCOMPRESSED", "PRIMARY INDEX", "QUERY CONDITION", "MMAP")

PARTS = """
SELECT table, count(), sum(rows), sum(bytes_on_disk) FROM system.parts
WHERE active AND database = currentDatabase() AND rows > 1000 GROUP BY table ORDER BY table
"""
MERGES = "SELECT count() FROM system.merges WHERE database = currentDatabase()"
SAMPLE = """
SELECT rollout_id, any(attempt_id), any(trace_id), any(attributes['session.id']), min(start_ns)
FROM spans WHERE rollout_id IN (
    SELECT rollout_id FROM rollout_events WHERE event = 'queued' AND mode = 'train'
    ORDER BY sipHash64(rollout_id) LIMIT {count:UInt32})
GROUP BY rollout_id ORDER BY sipHash64(rollout_id)
"""


class Asker:
    """A client that keeps count of what its queries read; the part of clickhouse_connect's that is used here."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._read: list[tuple[int, int]] = []

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self._read)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self._read)

    def query(self, query: str, parameters: Mapping[str, Any] | None = None) -> QueryResult:
        result = self._client.query(query, dict(parameters or {}), settings={"use_query_condition_cache": 0})
        self._read.append((int(result.summary.get("read_rows", 0)), int(result.summary.get("read_bytes", 0))))
        return result


@dataclass(frozen=True)
class Measured:
    """One question in one state."""

    p50_seconds: float
    max_seconds: float
    cpu_seconds: float
    rows: float
    bytes: float
    times: int


@dataclass(frozen=True)
class Rig:
    clickhouse: EmbeddedClickHouse
    client: Client

    def ask(self, question: Question, argument: Mapping[str, Any]) -> Asker:
        asker = Asker(self.client)
        if question.sql:
            found = len(asker.query(question.sql, argument).result_rows)
        else:
            found = int(rollout_tree(cast(Client, asker), argument["rollout_id"]) is not None)
        if not found and not question.may_be_none:
            raise SystemExit(f"{question.words}: no answer to {dict(argument)}")
        return asker

    def measure(self, question: Question, arguments: Sequence[Mapping[str, Any]], cold: bool) -> Measured:
        process = psutil.Process(self.clickhouse.pid)
        seconds: list[float] = []
        asked: list[Asker] = []
        used = 0.0
        if not cold:
            self.ask(question, arguments[-1])
        for argument in arguments:
            if cold:
                self.forget()
            before, begun = sum(process.cpu_times()[:2]), time.monotonic()
            asked.append(self.ask(question, argument))
            seconds.append(time.monotonic() - begun)
            used += sum(process.cpu_times()[:2]) - before
            if len(seconds) >= MIN_TIMES and sum(seconds) > MAX_SECONDS:
                break
        return Measured(
            statistics.median(seconds),
            max(seconds),
            used / len(seconds),
            statistics.fmean(one.rows for one in asked),
            statistics.fmean(one.bytes for one in asked),
            len(seconds),
        )

    def forget(self) -> None:
        """What the engine cached, and the kernel of the engine's files: nobody else's."""
        for cache in CACHES:
            self.client.command(f"SYSTEM DROP {cache} CACHE")
        for opened in self.files():
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)

    def files(self) -> Iterator[int]:
        """The engine's files, open one after the other."""
        for folder, _, names in os.walk(self.clickhouse.folder / "data"):
            for name in names:
                try:
                    opened = os.open(Path(folder, name), os.O_RDONLY)
                except FileNotFoundError:  # merged away meanwhile
                    continue
                try:
                    yield opened
                finally:
                    os.close(opened)

    def settle(self) -> float:
        """Waits until the engine finds nothing more to merge."""
        begun = quiet = time.monotonic()
        while (now := time.monotonic()) - quiet < 8:
            if now - begun > MAX_MERGE_SECONDS:
                print(f"  still merging after {MAX_MERGE_SECONDS:.0f} s: measured as it is")
                break
            if self.client.query(MERGES).result_rows[0][0]:
                quiet = now
            time.sleep(0.5)
        return time.monotonic() - begun - 8

    def parts(self) -> dict[str, tuple[int, int, int]]:
        rows = self.client.query(PARTS).result_rows
        found = {str(table): (int(parts), int(count), int(size)) for table, parts, count, size in rows}
        words = (f"{table} {count:,} in {parts}" for table, (parts, count, _) in found.items())
        print(f"  rows in parts: {', '.join(words)}", flush=True)
        return found


def fill(rig: Rig, load: Load) -> dict[str, float]:
    spans_seconds = timed("spans", load.insert_spans(rig.client))
    rest_seconds = timed("rewards, rollouts, trajectories, steps", load.insert_rest(rig.client))
    return {"spans_insert_seconds": spans_seconds, "rest_insert_seconds": rest_seconds}


def timed(words: str, steps: Iterator[None]) -> float:
    """Runs through `steps`; says every ten seconds which one it is at."""
    begun = said = time.monotonic()
    for number, _ in enumerate(steps, start=1):
        if (now := time.monotonic()) - said > 10:
            said = now
            print(f"  {words}: insert {number}, {now - begun:.0f} s", flush=True)
    print(f"  {words}: {time.monotonic() - begun:.0f} s", flush=True)
    return time.monotonic() - begun


def sampled(client: Client, load: Load) -> list[dict[str, Any]]:
    """Arguments: rollouts from all over the table, and what questions ask about them."""
    rows = client.query(SAMPLE, {"count": ARGUMENTS}).result_rows
    arguments = [
        {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "trace_id": trace_id,
            "session": session,
            "hour_ns": start_ns - start_ns % 3_600_000_000_000,
            "version": load.rollouts // 64 * number // len(rows),
            "since_ns": load.end_ns - 3_600_000_000_000,
        }
        for number, (rollout_id, attempt_id, trace_id, session, start_ns) in enumerate(rows)
    ]
    if len(arguments) < ARGUMENTS:
        raise SystemExit(f"--spans {load.spans}: too few; {ARGUMENTS * SPANS_A_ROLLOUT} at least")
    return arguments


def run(rig: Rig, load: Load) -> dict[str, float]:
    print(f"filling the tables with {load.spans:,} spans of {load.rollouts:,} rollouts …", flush=True)
    figures: dict[str, float] = {"spans": load.spans, "rollouts": load.rollouts, **fill(rig, load)}
    arguments = sampled(rig.client, load)
    found: dict[str, dict[str, Measured]] = {question.key: {} for question in QUESTIONS}

    def state(name: str, cold: bool) -> None:
        print(f"asking, {name} (load of the machine: {os.getloadavg()[0]:.1f}) …", flush=True)
        for question in QUESTIONS:
            found[question.key][name] = rig.measure(question, arguments, cold)

    rig.client.command("SYSTEM STOP MERGES")
    figures["ingested_parts"] = rig.parts()["spans"][0]
    state("ingested", cold=False)
    rig.client.command("SYSTEM START MERGES")
    print("merging …", flush=True)
    figures["merge_seconds"] = rig.settle()
    spans = rig.parts()["spans"]
    figures |= {"settled_parts": spans[0], "bytes_per_span": spans[2] / spans[1]}
    state("settled", cold=False)
    for opened in rig.files():
        os.fdatasync(opened)  # only clean pages can be dropped
    state("cold", cold=True)
    show(found)
    for key, states in found.items():
        for name, one in states.items():
            prefix = key if name == "settled" else f"{key}_{name}"
            figures |= {f"{prefix}_p50_seconds": one.p50_seconds, f"{prefix}_max_seconds": one.max_seconds}
        settled = states["settled"]
        figures |= {
            f"{key}_cpu_seconds": settled.cpu_seconds,
            f"{key}_rows_read": settled.rows,
            f"{key}_bytes_read": settled.bytes,
        }
    figures["reward_by_version_seconds"] = figures["reward_by_version_p50_seconds"]
    return figures


def show(found: Mapping[str, Mapping[str, Measured]]) -> None:
    states = ("settled", "cold", "ingested")
    titles = "".join(f"{name + ' p50':>14s} {'max':>8s}" for name in states)
    print(f"\n{'question':46s} {'rows read':>11s} {'MB read':>8s} {'CPU':>7s}{titles}   target (milliseconds)")
    for question in QUESTIONS:
        measured = found[question.key]
        settled = measured["settled"]
        line = (
            f"{question.words:46s} {settled.rows:11,.0f} {settled.bytes / 1e6:8.1f} {1000 * settled.cpu_seconds:7.0f}"
        )
        for name in states:
            one = measured[name]
            line += f"{1000 * one.p50_seconds:14.1f} {1000 * one.max_seconds:8.1f}"
        target = question.target_seconds
        if target is not None:
            line += f"   {1000 * target:.0f}: {'reached' if settled.p50_seconds < target else 'MISSED'}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spans", type=int, default=10_000_000)
    options = parser.parse_args()
    load = Load(options.spans // SPANS_A_ROLLOUT * SPANS_A_ROLLOUT, time.time_ns())
    with (
        tempfile.TemporaryDirectory(prefix="fulgurite-bench-") as folder,
        EmbeddedClickHouse(Path(folder, "clickhouse")) as clickhouse,
    ):
        settings = clickhouse.settings("queries")
        apply_migrations(settings)
        with clickhouse_connect.get_client(**connection_options(settings), database="queries") as client:
            figures = run(Rig(clickhouse, client), load)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))
    print(f"\nwritten to {OUT}")


if __name__ == "__main__":
    main()

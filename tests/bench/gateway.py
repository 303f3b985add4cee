"""What the gateway adds to a call of the policy, side by side with calling the policy's server directly.

    make bench-gateway           or: python -m tests.bench.gateway [--requests 100000] [--versions 5] [--skip versions]

A real broker, the gateway and a policy server that does nothing (gateway_null.py) as processes of their own; agents
that cost next to nothing (gateway_load.py) in this one. Everything is recorded, each answer waits for the broker.

- latency: to the first token and to the end, answers whole and streamed (32 events), 1, 16 and 128 at once; through the
  gateway and past it in turns of a second or so, so that what else the machine does meets both. The server pauses, a
  while of its own for each call, so that calls come at CALLS_A_SECOND or STREAMS_A_SECOND whatever the concurrency:
  below what a core can do, since above it one would measure a queue. The pauses are taken off what is reported. `added`
  is the percentile through the gateway less the percentile past it.
- throughput: 1, 16 and 128 at once without pauses. Requests a second on one core are 1 / CPU seconds of the gateway a
  request, which holds on a machine whose cores are shared; the wall rate stands beside it. The fewer at once, the more
  often the gateway wakes up for one of them and the larger is its CPU time a request. What a core can do is what it
  does when it is never idle: requests_per_second_per_core is that of 128 at once.
- token_route_…: the same two by the routes of token ids, which calls of rollouts take where a backend has them: render,
  then generate, so two questions a call. Past the gateway it is the chat route.
- versions: from publishing a version on `resources` to an answer it sampled, through a follower and the embedded policy
  server with the calculator's untrained model.
- memory: resident memory of the gateway over --requests, ten calls a rollout, in ten steps; growth is from the first
  step's end to the last's.

Prints a table and writes build/bench/gateway.json.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import aiohttp
import psutil
import uvloop

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.ports import free_port
from fulgurite.infra.processes import ChildProcess, start_process
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.settings import KafkaSettings, to_environment
from tests.bench.gateway_load import Agents, Timings
from tests.bench.gateway_null import EVENTS

OUT: Final = Path("build/bench/gateway.json")
CHAT: Final = "/v1/chat/completions"
TRACED: Final = f"/rollout/{{rollout}}/attempt/a1{CHAT}"
CONCURRENCIES: Final = (1, 16, 128)
CALLS_A_SECOND: Final = 300.0
STREAMS_A_SECOND: Final = 60.0
LEAST_PAUSE_MS: Final = 1.0
"""uvloop's clock."""
TURNS: Final = 8
START_SECONDS: Final = 60.0

START: Final = """
from {module} import main
from fulgurite.schemas.settings import load_settings
raise SystemExit(main(load_settings()))
"""

Figures = dict[str, float]


class Rig:
    """The broker, the null backend, a gateway in front of it."""

    def __init__(self, kafka: EmbeddedKafka, folder: Path) -> None:
        self.kafka = kafka
        self.folder = folder
        self.settings = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers)
        self.backend_port = free_port()
        self.token_backend_port = free_port()
        self.gateway_port = free_port()

    @contextmanager
    def service(self, name: str, module: str, sections: Mapping[str, Mapping[str, object]]) -> Generator[ChildProcess]:
        """A process of ours, with settings."""
        values = {"kafka": {"bootstrap_servers": self.kafka.bootstrap_servers}, **sections}
        command = [sys.executable, "-c", START.format(module=module)]
        with self.process(name, command, os.environ | to_environment(values)) as process:
            yield process

    @contextmanager
    def process(self, name: str, command: list[str], env: dict[str, str] | None = None) -> Generator[ChildProcess]:
        process = start_process(name, command, self.folder / f"{name}.log", env=env)
        try:
            yield process
        except BaseException:
            print(f"the last that {name} said:\n{process.log_tail()}", file=sys.stderr)
            raise
        finally:
            process.stop()

    @contextmanager
    def gateway(self, name: str, port: int, backend_port: int) -> Generator[ChildProcess]:
        section: dict[str, object] = {"port": port, "backend_url": f"http://127.0.0.1:{backend_port}"}
        with self.service(name, "fulgurite.producers.gateway", {"gateway": section}) as process:
            asyncio.run(until_well(port, process))
            yield process

    @contextmanager
    def null_backend(self, name: str, port: int, *options: str) -> Generator[ChildProcess]:
        command = [sys.executable, str(Path(__file__).with_name("gateway_null.py")), str(port), *options]
        with self.process(name, command) as process:
            yield process

    def agents(self, count: int, *, through: bool) -> Agents:
        return Agents(self.gateway_port, TRACED, count) if through else Agents(self.backend_port, CHAT, count)


async def until_well(port: int, process: ChildProcess) -> None:
    """Waits for its /health. Raises RuntimeError when it ended, or is not well in time."""
    until = time.monotonic() + START_SECONDS
    said = "nothing"
    async with aiohttp.ClientSession() as session:
        while process.running and time.monotonic() < until:
            try:
                async with session.get(f"http://127.0.0.1:{port}/health") as response:
                    if response.status == 200:
                        return
                    said = await response.text()
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
    raise RuntimeError(f"{process.name} is not well: {said}\n{process.log_tail()}")


def cpu_seconds(pid: int | None) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def percentile(values: list[float], of_hundred: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[of_hundred - 1]


async def latency(rig: Rig, samples: int) -> Figures:
    """Whole and streamed answers, at each concurrency, through the gateway and past it in turns."""
    figures: Figures = {}
    print(f"\nlatency in ms{'':27s} past it: p50     p99   through: p50     p99   added: p50     p99")
    for stream in (False, True):
        for count in CONCURRENCIES:
            rate = STREAMS_A_SECOND if stream else CALLS_A_SECOND
            pause_ms = max(LEAST_PAUSE_MS, count / rate * 1000 / (EVENTS if stream else 1))
            timings = {False: Timings(), True: Timings()}
            for turn in range(TURNS):
                for through in (False, True) if turn % 2 else (True, False):
                    async with rig.agents(count, through=through) as agents:
                        timings[through] += await agents.ask(
                            max(samples // TURNS, count), stream=stream, pause_ms=pause_ms
                        )
            kind = "stream" if stream else "call"
            parts = ("first", "total") if stream else ("total",)
            for part in parts:
                past, with_gateway = getattr(timings[False], part), getattr(timings[True], part)
                row: list[float] = []
                for of_hundred in (50, 99):
                    name = f"{kind}_{part}_p{of_hundred}_ms_at_{count}"
                    without, with_it = percentile(past, of_hundred), percentile(with_gateway, of_hundred)
                    figures[f"direct_{name}"], figures[f"gateway_{name}"] = without, with_it
                    figures[f"added_{name}"] = with_it - without
                    row += [without, with_it, with_it - without]
                (a, b, c), (d, e, f) = row[:3], row[3:]
                print(
                    f"{kind + ', ' + part:14s} {count:4d} at once, {len(past):5d} each {a:14.2f} {d:7.2f} {b:15.2f} "
                    f"{e:7.2f} {c:12.2f} {f:7.2f}",
                    flush=True,
                )
    figures["added_p50_ms"] = figures["added_call_total_p50_ms_at_16"]
    figures["added_p99_ms"] = figures["added_call_total_p99_ms_at_16"]
    return figures


async def throughput(rig: Rig, gateway: ChildProcess, backend: ChildProcess, calls: int) -> Figures:
    """Without pauses: CPU of each process a call through the gateway, and rates."""
    pids = {"gateway": gateway.pid, "backend": backend.pid, "broker": rig.kafka.pid, "agents": os.getpid()}
    figures: Figures = {}
    for count in CONCURRENCIES:
        asked = max(calls // TURNS, count) if count > 1 else calls // TURNS // 8  # one at a time takes its time
        cpu = dict.fromkeys(pids, 0.0)
        wall = {False: 0.0, True: 0.0}
        async with rig.agents(count, through=True) as agents:
            await agents.ask(asked)
        for _ in range(TURNS):
            for through in (False, True):
                async with rig.agents(count, through=through) as agents:
                    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
                    began = time.perf_counter()
                    await agents.ask(asked)
                    wall[through] += time.perf_counter() - began
                    spent = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
                if through:
                    cpu = {name: cpu[name] + spent[name] for name in pids}
        asked *= TURNS
        found = {f"{name}_cpu_ms_per_request": seconds / asked * 1000 for name, seconds in cpu.items()}
        found["gateway_cores_busy"] = cpu["gateway"] / wall[True]
        found["requests_per_second_per_core"] = asked / cpu["gateway"]
        found["requests_per_second_wall"] = asked / wall[True]
        found["direct_requests_per_second_wall"] = asked / wall[False]
        print(f"\n{asked:,} calls, {count} at once, no pause")
        show(found)
        figures |= {f"{name}_at_{count}": value for name, value in found.items()}
    figures["requests_per_second_per_core"] = figures[f"requests_per_second_per_core_at_{max(CONCURRENCIES)}"]
    return figures


async def memory(rig: Rig, gateway: ChildProcess, requests: int) -> Figures:
    process = psutil.Process(gateway.pid)
    step = max(requests // 10, 1)
    sizes: list[float] = []
    print(f"\nresident memory of the gateway over {step * 10:,} requests, in MiB")
    async with rig.agents(16, through=True) as agents:
        for number in range(1, 11):
            await agents.ask(step)
            sizes.append(process.memory_info().rss / 2**20)
            print(f"  after {number * step:9,d} {sizes[-1]:8.1f}", flush=True)
    # Of the first step's end and the last's: what was there to begin with, caches that fill up included, is no growth.
    figures = {"memory_growth_mib": sizes[-1] - sizes[0]}
    figures |= {f"rss_mib_at_{number * step}": sizes[number - 1] for number in (1, 5, 10)}
    show(figures)
    return figures


def measure(rig: Rig, gateway: ChildProcess, backend: ChildProcess, options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    if "throughput" not in options.skip:
        figures |= uvloop.run(throughput(rig, gateway, backend, options.calls))
    if "latency" not in options.skip:
        figures |= uvloop.run(latency(rig, options.samples))
    return figures


def show(figures: Figures) -> None:
    for name, value in figures.items():
        print(f"  {name:44s} {value:12,.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000, help="answers of each latency, both ways")
    parser.add_argument("--calls", type=int, default=16_000, help="of the throughput")
    parser.add_argument("--requests", type=int, default=100_000, help="of the memory's part")
    parser.add_argument("--versions", type=int, default=5, help="versions to publish")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["latency", "throughput", "tokens", "versions", "memory"]
    )
    options = parser.parse_args()
    figures: Figures = {}
    with (
        tempfile.TemporaryDirectory(prefix="fulgurite-bench-") as folder,
        EmbeddedKafka(Path(folder) / "kafka") as kafka,
    ):
        rig = Rig(kafka, Path(folder))
        uvloop.run(create_topics(rig.settings))
        with rig.null_backend("null-backend", rig.backend_port) as backend:
            with rig.gateway("gateway", rig.gateway_port, rig.backend_port) as gateway:
                figures |= measure(rig, gateway, backend, options)
                if "memory" not in options.skip:
                    figures |= uvloop.run(memory(rig, gateway, options.requests))
            if "tokens" not in options.skip:
                print("\nby the routes of token ids")
                with (
                    rig.null_backend("token-backend", rig.token_backend_port, "--tokens") as token_backend,
                    rig.gateway("token-gateway", rig.gateway_port, rig.token_backend_port) as gateway,
                ):
                    found = measure(rig, gateway, token_backend, options)
                figures |= {f"token_route_{name}": value for name, value in found.items()}
        if "versions" not in options.skip:
            from tests.bench.gateway_versions import publish_to_served

            figures |= publish_to_served(rig, options.versions)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nwrote {OUT}")


if __name__ == "__main__":
    main()

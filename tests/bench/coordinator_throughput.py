"""How much the coordinator takes: enqueue, dequeue in batches by long poll, report ends, over HTTP and the real broker.

    python tests/bench/coordinator_throughput.py [rollouts]

Prints rollouts/s and the coordinator's own CPU seconds, then the latency of single commands and of a replay.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.settings import KafkaSettings, to_environment

BATCH = 16
MAIN = """
from fulgurite.consumers.coordinator import main
from fulgurite.schemas.settings import load_settings
raise SystemExit(main(load_settings()))
"""
PORT = 14747


async def healthy(http: httpx.AsyncClient) -> None:
    while True:
        try:
            if (await http.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.02)


async def end(http: httpx.AsyncClient, work: dict[str, dict[str, str]]) -> float:
    started = time.perf_counter()
    path = f"/rollouts/{work['rollout_id']}/attempts/{work['attempt']['attempt_id']}"
    (await http.post(path, json={"status": "succeeded"})).raise_for_status()
    return time.perf_counter() - started


async def lifecycle(http: httpx.AsyncClient, rollouts: int, process: psutil.Process) -> None:
    started, cpu = time.perf_counter(), process.cpu_times()
    tasks = [{"input": {"question": f"{n} + {n}"}, "group_id": f"g{n // 8}", "group_size": 8} for n in range(rollouts)]
    (await http.post("/queues/rollouts/enqueue", json={"rollouts": tasks})).raise_for_status()
    queued = time.perf_counter()
    took_dequeue: list[float] = []
    took_end: list[float] = []
    done = 0
    while done < rollouts:
        asked = time.perf_counter()
        answer = await http.post("/queues/rollouts/dequeue", json={"limit": BATCH, "wait_seconds": 5, "worker_id": "w"})
        took_dequeue.append(time.perf_counter() - asked)
        work = answer.raise_for_status().json()
        took_end += await asyncio.gather(*(end(http, each) for each in work))
        done += len(work)
    total = time.perf_counter() - started
    after = process.cpu_times()
    used = after.user + after.system - cpu.user - cpu.system
    print(f"enqueue of {rollouts}: {queued - started:.2f} s")
    print(f"lifecycle: {rollouts / total:.0f} rollouts/s, {used:.2f} CPU s = {1e3 * used / rollouts:.2f} ms a rollout")
    for name, took in (("dequeue of 16", took_dequeue), ("end, 16 at once", took_end)):
        p99 = sorted(took)[int(0.99 * (len(took) - 1))]
        print(f"{name}: p50 {1e3 * statistics.median(took):.1f} ms, p99 {1e3 * p99:.1f} ms")


async def one_by_one(http: httpx.AsyncClient) -> None:
    took: list[float] = []
    for _ in range(100):
        poll = asyncio.create_task(http.post("/queues/rollouts/dequeue", json={"wait_seconds": 5}))
        await asyncio.sleep(0.01)
        started = time.perf_counter()
        await http.post("/queues/rollouts/enqueue", json={"rollouts": [{}]})
        [work] = (await poll).json()
        took.append(time.perf_counter() - started)
        await end(http, work)
    print(f"enqueue to waiting worker: p50 {1e3 * statistics.median(took):.1f} ms, max {1e3 * max(took):.1f} ms")


async def main(rollouts: int) -> None:
    with tempfile.TemporaryDirectory() as folder, EmbeddedKafka(Path(folder)) as server:
        kafka = KafkaSettings(bootstrap_servers=server.bootstrap_servers, topic_prefix=f"b{secrets.token_hex(3)}.")
        await create_topics(kafka)
        env = dict(os.environ) | to_environment(
            {"kafka": kafka.model_dump(exclude_defaults=True), "coordinator": {"port": PORT}}
        )
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", MAIN, env=env)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}/v1/agl", timeout=60, trust_env=False) as http:
            try:
                await healthy(http)
                process = psutil.Process(child.pid)
                for _ in range(3):
                    await lifecycle(http, rollouts, process)
                await one_by_one(http)
                idle = sum(process.cpu_times()[:2])
                await asyncio.sleep(5)
                print(f"idle: {100 * (sum(process.cpu_times()[:2]) - idle) / 5:.1f} % of a core")
            finally:
                child.kill()
                await child.wait()
            started = time.perf_counter()
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", MAIN, env=env)
            try:
                await healthy(http)
                print(
                    f"kill -9, start, replay of {3 * rollouts} rollouts, ready: {time.perf_counter() - started:.2f} s"
                )
            finally:
                child.terminate()
                await child.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000))

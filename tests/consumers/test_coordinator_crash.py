"""kill -9 of the coordinator under load, again and again: nothing lost, nothing handed out or ended twice."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from fulgurite.consumers.coordinator.state import State
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, RolloutEvent
from fulgurite.schemas.settings import CoordinatorSettings, KafkaSettings, Settings, to_environment
from fulgurite.schemas.topics import ROLLOUTS

ROLLOUTS_TOTAL = 300
KILLS = 3
MAIN = """
from fulgurite.consumers.coordinator import main
from fulgurite.schemas.settings import load_settings
raise SystemExit(main(load_settings()))
"""


async def spawn(settings: Settings) -> Process:
    own = {
        "kafka": settings.kafka.model_dump(exclude_defaults=True),
        "coordinator": {"port": settings.coordinator.port, "tick_seconds": 0.1},
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("FULGURITE_")}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", MAIN, env=env | to_environment(own))


class Client:
    """Asks until it is answered, as runners do."""

    def __init__(self, settings: Settings) -> None:
        url = f"http://127.0.0.1:{settings.coordinator.port}/v1/agl"
        self.http = httpx.AsyncClient(base_url=url, timeout=10.0, trust_env=False)
        self.handed_out: list[tuple[str, str]] = []
        self.acknowledged: dict[str, str] = {}

    async def post(self, path: str, **body: Any) -> httpx.Response:
        while True:
            try:
                answer = await self.http.post(path, json=body)
            except httpx.TransportError:
                await asyncio.sleep(0.05)
                continue
            if answer.status_code != 503:
                return answer
            await asyncio.sleep(0.05)

    async def enqueue(self) -> None:
        config = {"unresponsive_seconds": 2.0, "max_attempts": 100}
        for number in range(0, ROLLOUTS_TOTAL, 5):
            new = [{"rollout_id": f"r{number + n}", "config": config} for n in range(5)]
            answer = await self.post("/queues/rollouts/enqueue", rollouts=new)
            assert answer.status_code == 201
            await asyncio.sleep(0.02)

    async def work(self, worker_id: str, done: asyncio.Event) -> None:
        while not done.is_set():
            answer = await self.post("/queues/rollouts/dequeue", worker_id=worker_id, limit=4, wait_seconds=0.5)
            for work in answer.json():
                rollout_id, attempt_id = work["rollout_id"], work["attempt"]["attempt_id"]
                self.handed_out.append((rollout_id, attempt_id))
                ended = await self.post(f"/rollouts/{rollout_id}/attempts/{attempt_id}", status="succeeded")
                if ended.status_code == 200:
                    assert self.acknowledged.setdefault(rollout_id, attempt_id) == attempt_id
                else:  # the lease was over before we could be heard
                    assert ended.status_code == 409, ended.text

    async def wait(self) -> None:
        ids = [f"r{n}" for n in range(ROLLOUTS_TOTAL)]
        while len((await self.post("/waits/rollouts", rollout_ids=ids, timeout=5)).json()) < ROLLOUTS_TOTAL:
            pass


async def read_events(kafka: KafkaSettings) -> list[RolloutEvent]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(kafka.topic(ROLLOUTS), number) for number in range(kafka.partitions)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        events: list[RolloutEvent] = []
        while any([await consumer.position(tp) < ends[tp] for tp in partitions]):
            for records in (await consumer.getmany(timeout_ms=100)).values():
                events += [ROLLOUT_EVENT.validate_json(record.value or b"") for record in records]
        return events
    finally:
        await consumer.stop()


@pytest.mark.chaos
@pytest.mark.slow
async def test_killed_under_load_it_loses_nothing_and_counts_nothing_twice(
    kafka_settings: KafkaSettings, unused_tcp_port: int
) -> None:
    settings = Settings(kafka=kafka_settings, coordinator=CoordinatorSettings(port=unused_tcp_port))
    process = await spawn(settings)
    client, done = Client(settings), asyncio.Event()
    workers = [asyncio.create_task(client.work(f"w{n}", done)) for n in range(4)]
    try:
        enqueue = asyncio.create_task(client.enqueue())
        for _ in range(KILLS):
            await client.post("/queues/rollouts/dequeue", limit=1, worker_id="dies")  # up, and one attempt left alone
            await asyncio.sleep(0.6)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            process = await spawn(settings)
        await enqueue
        await asyncio.wait_for(client.wait(), 60)
        done.set()
        await asyncio.gather(*workers)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        for worker in workers:
            worker.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
        await client.http.aclose()

    state = State(max_ended=10_000)
    applied: Counter[tuple[str, str]] = Counter()
    for event in await read_events(kafka_settings):
        if state.apply(event) == "applied":
            applied[event.event, event.rollout_id] += 1
    assert len(state.rollouts) == ROLLOUTS_TOTAL
    assert dict(state.counts)["succeeded"] == ROLLOUTS_TOTAL
    assert all(applied["finished", rollout_id] == 1 for rollout_id in state.rollouts)
    assert not state.owed
    assert len(client.handed_out) == len(set(client.handed_out))
    for rollout_id, attempt_id in client.acknowledged.items():
        record = state.rollouts[rollout_id]
        latest = record.latest
        assert latest is not None
        assert (latest.attempt_id, latest.end) == (attempt_id, "succeeded")


@pytest.mark.chaos
@pytest.mark.slow
async def test_it_outlives_the_broker_and_stops_promptly_without_it(tmp_path: Path, unused_tcp_port: int) -> None:
    with EmbeddedKafka(tmp_path) as server:
        kafka = KafkaSettings(bootstrap_servers=server.bootstrap_servers, partitions=2)
        await create_topics(kafka)
        settings = Settings(kafka=kafka, coordinator=CoordinatorSettings(port=unused_tcp_port))
        process = await spawn(settings)
        client = Client(settings)
        try:
            new = {"rollouts": [{"rollout_id": "before"}]}
            assert (await client.post("/queues/rollouts/enqueue", **new)).status_code == 201
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(4)
            assert (await client.http.get("/health")).status_code == 503
            await asyncio.to_thread(server.start)
            during = {"rollouts": [{"rollout_id": "after"}]}
            assert (await asyncio.wait_for(client.post("/queues/rollouts/enqueue", **during), 40)).status_code == 201
            work = (await client.post("/queues/rollouts/dequeue", limit=5)).json()
            assert [each["rollout_id"] for each in work] == ["before", "after"]

            await asyncio.to_thread(server.kill)
            await asyncio.sleep(2)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 8) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await client.http.aclose()

"""The coordinator over HTTP and the real broker: commands, waits, leases, foreign records, restarts, takeover."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

from fulgurite.consumers.coordinator import serve
from fulgurite.producers.partitions import partition_of
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.dead_letters import HEADER_OFFSET, HEADER_REASON, HEADER_STAGE
from fulgurite.schemas.errors import Fenced, StartError
from fulgurite.schemas.rollouts import (
    ROLLOUT_EVENT,
    AttemptFinished,
    AttemptHeartbeat,
    AttemptStarted,
    RolloutCancelled,
    RolloutConfig,
    RolloutEvent,
    RolloutQueued,
)
from fulgurite.schemas.settings import CoordinatorSettings, KafkaSettings, Settings
from fulgurite.schemas.topics import DEAD_LETTERS, ROLLOUTS, WORKERS, Topic
from tests.consumers.poison import poison

Json = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A coordinator in this process and a client of it."""

    def __init__(self, settings: Settings) -> None:
        self._stop = asyncio.Event()
        self.task = asyncio.create_task(serve(settings, self._stop))
        url = f"http://127.0.0.1:{settings.coordinator.port}/v1/agl"
        self.http = httpx.AsyncClient(base_url=url, timeout=40.0, trust_env=False)

    async def ready(self, seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not self.task.done():
                try:
                    if (await self.http.get("/health")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.02)
        await self.task

    async def stop(self) -> None:
        self._stop.set()
        await self.http.aclose()
        await self.task

    async def post(self, path: str, expect: int = 200, /, **body: Any) -> Any:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == expect, answer.text
        return answer.json()

    async def get(self, path: str, expect: int = 200, /, **query: Any) -> Any:
        answer = await self.http.get(path, params=query)
        assert answer.status_code == expect, answer.text
        return answer.json()

    async def enqueue(self, *rollouts: Json) -> list[Json]:
        return await self.post("/queues/rollouts/enqueue", 201, rollouts=list(rollouts))

    async def dequeue(self, limit: int = 1, wait_seconds: float = 0.0, worker_id: str = "w") -> list[Json]:
        return await self.post("/queues/rollouts/dequeue", limit=limit, wait_seconds=wait_seconds, worker_id=worker_id)

    async def end(self, work: Json, status: str = "succeeded", expect: int = 200) -> Json:
        return await self.post(
            f"/rollouts/{work['rollout_id']}/attempts/{work['attempt']['attempt_id']}", expect, status=status
        )


def settings_for(kafka: KafkaSettings, **own: Any) -> Settings:
    return Settings(kafka=kafka, coordinator=CoordinatorSettings(port=free_port(), tick_seconds=0.1, **own))


@asynccontextmanager
async def coordinator(kafka: KafkaSettings, **own: Any) -> AsyncGenerator[Running]:
    running = Running(settings_for(kafka, **own))
    try:
        await running.ready()
        yield running
    finally:
        await running.stop()


async def read_all(kafka: KafkaSettings, topic: Topic) -> list[Any]:
    """Every committed record, in the order of each partition."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        partitions = topic.partitions or kafka.partitions
        assigned = [TopicPartition(kafka.topic(topic), partition) for partition in range(partitions)]
        consumer.assign(assigned)
        ends = await consumer.end_offsets(assigned)
        records: list[Any] = []
        while any([await consumer.position(tp) < ends[tp] for tp in assigned]):
            for found in (await consumer.getmany(timeout_ms=100)).values():
                records += found
        return records
    finally:
        await consumer.stop()


async def events_of(kafka: KafkaSettings, rollout_id: str) -> list[RolloutEvent]:
    events = [ROLLOUT_EVENT.validate_json(record.value) for record in await read_all(kafka, ROLLOUTS)]
    return [event for event in events if event.rollout_id == rollout_id]


async def publish(kafka: KafkaSettings, *events: RolloutEvent) -> None:
    async with Publisher(kafka) as publisher:
        for event in events:
            await (await publisher.publish_rollout(event))


async def until(check: Any, seconds: float = 5.0) -> Any:
    """What `check` gives once it is true."""
    async with asyncio.timeout(seconds):
        while not (found := await check()):  # noqa: ASYNC110 (the broker has no event to wait for)
            await asyncio.sleep(0.02)
    return found


async def test_a_rollout_from_queue_to_end(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        [queued] = await api.enqueue({"rollout_id": "r1", "input": {"q": "1+1"}, "group_id": "g", "group_size": 2})
        assert (queued["status"], queued["input"]) == ("queuing", {"q": "1+1"})
        [again] = await api.enqueue({"rollout_id": "r1", "input": "another"})
        assert again == queued

        [work] = await api.dequeue(limit=4, worker_id="w1")
        assert (work["status"], work["attempt"]["sequence_id"], work["attempt"]["worker_id"]) == ("preparing", 1, "w1")
        assert await api.dequeue() == []
        attempt_id = work["attempt"]["attempt_id"]
        assert await api.post("/workers/w1", running=[attempt_id, "gone"], capacity=8) == {"stop": ["gone"]}
        assert await api.post("/workers/w2", running=[attempt_id]) == {"stop": [attempt_id]}
        assert (await api.get("/rollouts/r1"))["status"] == "running"
        assert (await api.get("/workers/w1"))["status"] == "busy"

        ended = await api.end(work)
        assert ended["status"] == "succeeded"
        assert await api.end(work) == ended
        assert "ended already: succeeded" in (await api.end(work, "failed", expect=409))["detail"]
        final = await api.get("/rollouts/r1")
        assert (final["status"], final["attempt"]["status"]) == ("succeeded", "succeeded")
        assert (await api.get("/rollouts/r1/attempts"))["total"] == 1
        assert (await api.get("/rollouts/r1/attempts/latest"))["attempt_id"] == attempt_id
        statistics = await api.get("/statistics")
        assert (statistics["rollouts"], statistics["open_attempts"]) == ({"succeeded": 1}, 0)

    names = [event.event for event in await events_of(kafka_settings, "r1")]
    assert names == ["queued", "attempt_started", "attempt_finished", "finished"]
    assert {record.key for record in await read_all(kafka_settings, WORKERS)} == {b"w1", b"w2"}


async def test_errors_are_clear(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        await api.get("/rollouts/nobody", 404)
        await api.get("/workers/nobody", 404)
        await api.post("/rollouts/nobody/attempts/a", 404, status="succeeded")
        await api.post("/rollouts/nobody", 404, status="cancelled")
        assert (
            "rollouts.0.mode"
            in (await api.post("/queues/rollouts/enqueue", 422, rollouts=[{"mode": "practice"}]))["detail"]
        )
        assert "limit" in (await api.post("/queues/rollouts/dequeue", 422, limit=0))["detail"]
        assert "limit" in (await api.get("/rollouts", 422, limit=0))["detail"]
        await api.enqueue({"rollout_id": "r1"})
        assert "only cancelled" in (await api.post("/rollouts/r1", 422, status="succeeded"))["detail"]
        await api.post("/rollouts/r1/attempts/none", 404, status="succeeded")
        too_large = "x" * kafka_settings.max_record_bytes
        detail = await api.post("/queues/rollouts/enqueue", 413, rollouts=[{"rollout_id": "ok"}, {"input": too_large}])
        assert "max_record_bytes" in detail["detail"]
        await api.get("/rollouts/ok", 404)  # all or nothing
        listed = await api.get("/rollouts", status_in="queuing,requeuing", mode="train", limit=10)
        assert (listed["total"], [each["rollout_id"] for each in listed["items"]]) == (1, ["r1"])
        assert (await api.get("/rollouts", run_id="other"))["total"] == 0


async def test_a_long_poll_wakes_at_once_and_workers_share_the_queue(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        polls = [asyncio.create_task(api.dequeue(limit=2, wait_seconds=10, worker_id=f"w{n}")) for n in range(3)]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await api.enqueue(*({"rollout_id": f"r{n}"} for n in range(5)))
        answers = await asyncio.gather(*polls)
        assert time.monotonic() - started < 4  # not at the end of the wait
        handed_out = [work["rollout_id"] for answer in answers for work in answer]
        assert sorted(handed_out) == [f"r{n}" for n in range(5)]

        poll = asyncio.create_task(api.dequeue(wait_seconds=10))
        await asyncio.sleep(0.2)
        await publish(kafka_settings, RolloutQueued(rollout_id="foreign", input=[1]))
        [work] = await poll
        assert work["rollout_id"] == "foreign"

        wait = asyncio.create_task(api.post("/waits/rollouts", rollout_ids=["foreign"], timeout=10))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await api.end(work)
        assert [each["status"] for each in await wait] == ["succeeded"]
        assert time.monotonic() - started < 4
        started = time.monotonic()
        assert await api.post("/waits/rollouts", rollout_ids=["foreign", "r1"], timeout=0.2) != []
        assert 0.15 < time.monotonic() - started < 4


async def test_waking_takes_less_than_200_ms(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        took: list[float] = []
        for number in range(5):
            poll = asyncio.create_task(api.dequeue(wait_seconds=10))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await api.enqueue({"rollout_id": f"r{number}"})
            assert len(await poll) == 1
            took.append(time.monotonic() - started)
        assert sorted(took)[2] < 0.2, took


async def test_a_worker_that_hung_up_gets_nothing(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        url = str(api.http.base_url)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as leaving:
            with pytest.raises(httpx.ReadTimeout):
                await leaving.post("/queues/rollouts/dequeue", json={"wait_seconds": 10}, timeout=0.3)
        await asyncio.sleep(0.2)
        await api.enqueue({"rollout_id": "r1"})
        await asyncio.sleep(0.2)
        assert [work["attempt"]["sequence_id"] for work in await api.dequeue()] == [1]


async def test_timeout_silence_and_retry(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        impatient = {"timeout_seconds": 1.5, "max_attempts": 2}
        await api.enqueue(
            {"rollout_id": "slow", "config": impatient},
            {"rollout_id": "silent", "config": {"unresponsive_seconds": 0.5, "max_attempts": 1}},
            {"rollout_id": "alive", "config": {"unresponsive_seconds": 6.0, "max_attempts": 1}},
        )
        work = {each["rollout_id"]: each for each in await api.dequeue(limit=3, worker_id="w")}

        async def beat_alive() -> list[Json]:
            await api.post("/workers/w", running=[work["alive"]["attempt"]["attempt_id"]])
            return await api.dequeue(limit=3)

        started = time.monotonic()
        [second] = await until(beat_alive)
        assert time.monotonic() - started < 4.5
        assert (second["rollout_id"], second["attempt"]["sequence_id"]) == ("slow", 2)
        detail = (await api.end(work["slow"], expect=409))["detail"]
        assert "ended already: timeout" in detail
        attempt_id = work["slow"]["attempt"]["attempt_id"]
        assert (await api.post("/workers/w", running=[attempt_id]))["stop"] == [attempt_id]
        await api.end(second)
        assert (await api.get("/rollouts/slow"))["status"] == "succeeded"
        [silent] = await api.post("/waits/rollouts", rollout_ids=["silent"], timeout=5)
        assert (silent["status"], silent["attempt"]["status"]) == ("failed", "unresponsive")
        assert (await api.get("/rollouts/alive"))["status"] == "running"
    names = [event.event for event in await events_of(kafka_settings, "slow")]
    attempt = ["attempt_started", "attempt_finished"]
    assert names == ["queued", *attempt, "requeued", *attempt, "finished"]


async def test_cancel(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        await api.enqueue({"rollout_id": "waiting"}, {"rollout_id": "working"}, {"rollout_id": "foreign"})
        assert (await api.post("/rollouts/waiting", status="cancelled", reason="no"))["status"] == "cancelled"
        work = {each["rollout_id"]: each for each in await api.dequeue(limit=3)}
        assert set(work) == {"working", "foreign"}
        assert (await api.post("/rollouts/working", status="cancelled"))["status"] == "cancelled"
        assert (await api.post("/rollouts/working", status="cancelled"))["status"] == "cancelled"
        await publish(kafka_settings, RolloutCancelled(rollout_id="foreign", reason="by record"))
        [ended] = await api.post("/waits/rollouts", rollout_ids=["foreign"], timeout=5)
        assert (ended["status"], ended["error"]) == ("cancelled", "by record")
        ids = [each["attempt"]["attempt_id"] for each in work.values()]
        assert (await api.post("/workers/w", running=ids))["stop"] == ids
        for each in work.values():
            assert "cancelled" in (await api.end(each, expect=409))["detail"]
    names = [event.event for event in await events_of(kafka_settings, "working")]
    assert names == ["queued", "attempt_started", "cancelled", "attempt_finished", "finished"]


async def test_start_creates_past_the_queue(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        started = await api.post("/rollouts", 201, rollout_id="mine", input=1, worker_id="me")
        assert (started["status"], started["attempt"]["worker_id"]) == ("preparing", "me")
        assert await api.post("/rollouts", 201, rollout_id="mine", input=2) == started
        assert await api.dequeue() == []


async def test_a_restart_rebuilds_everything_and_leases_begin_anew(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        short = {"unresponsive_seconds": 1.0, "max_attempts": 1}
        await api.enqueue(*({"rollout_id": f"r{n}", "config": short, "input": n} for n in range(6)))
        work = await api.dequeue(limit=4)
        await api.end(work[0])
        await api.end(work[1], "failed")
        before = await api.get("/rollouts", limit=100)
    await asyncio.sleep(1.2)  # longer than the leases
    async with coordinator(kafka_settings) as api:
        after = await api.get("/rollouts", limit=100)
        by_id = {each["rollout_id"]: each for each in after["items"]}
        assert by_id == {each["rollout_id"]: each for each in before["items"]}
        await api.end(work[2])
        assert [each["rollout_id"] for each in await api.dequeue(limit=5)] == ["r4", "r5"]
        [silent] = await api.post("/waits/rollouts", rollout_ids=["r3"], timeout=5)
        assert silent["attempt"]["status"] == "unresponsive"


async def test_an_end_without_successor_is_completed_by_the_next_coordinator(kafka_settings: KafkaSettings) -> None:
    """The crash inside step 2 of engine.py: the first record of the pair is in the log, the second is not."""
    common: Json = {"rollout_id": "r1", "run_id": "run", "group_id": "g", "group_size": 3}
    await publish(
        kafka_settings,
        RolloutQueued(**common, config=RolloutConfig(max_attempts=2)),
        AttemptStarted(**common, attempt_id="a1", sequence_id=1),
        AttemptFinished(**common, attempt_id="a1", status="succeeded"),
        RolloutQueued(rollout_id="r2", config=RolloutConfig(max_attempts=2)),
        AttemptStarted(rollout_id="r2", attempt_id="b1", sequence_id=1),
        AttemptFinished(rollout_id="r2", attempt_id="b1", status="timeout"),
        RolloutQueued(rollout_id="r3"),
        RolloutCancelled(rollout_id="r3"),
    )
    for _ in range(2):
        async with coordinator(kafka_settings) as api:
            ended = await api.post("/waits/rollouts", rollout_ids=["r1", "r3"], timeout=5)
            assert [each["status"] for each in ended] == ["succeeded", "cancelled"]
            assert (await api.get("/rollouts/r2"))["status"] == "requeuing"
    last = (await events_of(kafka_settings, "r1"))[-1]
    assert last.event == "finished"
    assert (last.attempt_id, last.attempts, last.run_id, last.group_size) == ("a1", 1, "run", 3)
    assert Counter(event.event for event in await events_of(kafka_settings, "r1"))["finished"] == 1
    assert Counter(event.event for event in await events_of(kafka_settings, "r2"))["requeued"] == 1


async def test_foreign_heartbeats_keep_an_attempt_alive(kafka_settings: KafkaSettings) -> None:
    async with coordinator(kafka_settings) as api:
        await api.enqueue({"rollout_id": "r1", "config": {"unresponsive_seconds": 3.0, "max_attempts": 1}})
        [work] = await api.dequeue()
        async with Publisher(kafka_settings) as publisher:
            for _ in range(8):
                await asyncio.sleep(0.5)
                beat = AttemptHeartbeat(rollout_id="r1", attempt_id=work["attempt"]["attempt_id"])
                await (await publisher.publish_rollout(beat))
        assert (await api.get("/rollouts/r1"))["status"] == "running"


async def test_an_invalid_record_is_one_dead_letter_however_often_the_log_is_replayed(
    kafka_settings: KafkaSettings,
) -> None:
    topic = kafka_settings.topic(ROLLOUTS)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_settings.bootstrap_servers)
    await producer.start()
    try:
        await producer.send_and_wait(topic, b"{not json", key=b"k")
        async with coordinator(kafka_settings) as api:
            await producer.send_and_wait(topic, b'{"event": "dance", "rollout_id": "r"}', key=b"r")
            await publish(kafka_settings, AttemptHeartbeat(rollout_id="nobody", attempt_id="a"))
            await until(lambda: _as_many(kafka_settings, 3))
            await api.enqueue({"rollout_id": "still-works"})
            await poison(kafka_settings, ROLLOUTS, b'{"event": "attempt_heartbeat"}')
            await until(lambda: _as_many(kafka_settings, 5))
            await api.enqueue({"rollout_id": "works-on"})
        for _ in range(2):
            async with coordinator(kafka_settings):
                await asyncio.sleep(0.2)
        await producer.send_and_wait(topic, None, key=b"empty")
        async with coordinator(kafka_settings):
            await until(lambda: _as_many(kafka_settings, 6))
    finally:
        await producer.stop()
    letters = await read_all(kafka_settings, DEAD_LETTERS)
    headers = [dict(letter.headers) for letter in letters]
    assert Counter(each[HEADER_REASON] for each in headers) == {
        b"not_json": 1,
        b"bad_field": 1,
        b"unknown_rollout": 1,
        b"empty": 1,
        b"undecodable": 2,
    }
    assert {each[HEADER_STAGE] for each in headers} == {b"coordinator"}
    assert all(each[HEADER_OFFSET].isdigit() for each in headers)
    values = {letter.value for letter in letters if letter.key == b"k"}
    assert values == {b"{not json", b'{"event": "attempt_heartbeat"}'}


async def _as_many(kafka: KafkaSettings, count: int) -> bool:
    found = len(await read_all(kafka, DEAD_LETTERS))
    assert found <= count
    return found == count


async def test_a_misrouted_record_is_forwarded_once(kafka_settings: KafkaSettings) -> None:
    """Other clients' default partitioners are not Kafka's: the rollout's events would not be in one order."""
    wrong = 1 - partition_of(b"r1", kafka_settings.partitions)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_settings.bootstrap_servers)
    await producer.start()
    try:
        value = RolloutQueued(rollout_id="r1", input=7).model_dump_json().encode()
        await producer.send_and_wait(kafka_settings.topic(ROLLOUTS), value, key=b"r1", partition=wrong)
    finally:
        await producer.stop()
    for _ in range(2):
        async with coordinator(kafka_settings) as api:
            assert (await until(lambda: api.http.get("/rollouts/r1"))).status_code in (200, 404)
            await until(lambda: _found(api, "r1"))
    records = await read_all(kafka_settings, ROLLOUTS)
    assert sorted(record.partition for record in records) == [0, 1]


async def _found(api: Running, rollout_id: str) -> bool:
    return (await api.http.get(f"/rollouts/{rollout_id}")).status_code == 200


async def test_a_second_coordinator_takes_over_and_the_first_is_fenced(kafka_settings: KafkaSettings) -> None:
    first = Running(settings_for(kafka_settings))
    await first.ready()
    await first.enqueue(*({"rollout_id": f"r{n}"} for n in range(3)))
    [work] = await first.dequeue()
    async with coordinator(kafka_settings) as second:
        # Until it notices, the first may still answer: the log judges both alike, and no rollout is handed out twice.
        both = await asyncio.gather(first.dequeue(limit=5), second.dequeue(limit=5), return_exceptions=True)
        handed_out = [each["rollout_id"] for answer in both if isinstance(answer, list) for each in answer]
        assert len(handed_out) == len(set(handed_out))
        with pytest.raises(Fenced):
            await asyncio.wait_for(asyncio.shield(first.task), 5)
        await first.http.aclose()
        await second.end(work)
        rest = await second.dequeue(limit=5)
        assert sorted([*handed_out, *(each["rollout_id"] for each in rest)]) == ["r1", "r2"]


async def test_who_cannot_listen_does_not_depose_who_can(kafka_settings: KafkaSettings) -> None:
    settings = settings_for(kafka_settings)
    first = Running(settings)
    await first.ready()
    with pytest.raises(StartError, match=str(settings.coordinator.port)):
        await serve(settings, asyncio.Event())
    await asyncio.sleep(1.2)
    assert (await first.http.get("/health")).status_code == 200
    await first.stop()


async def test_it_stops_promptly_with_a_long_poll_open(kafka_settings: KafkaSettings) -> None:
    running = Running(settings_for(kafka_settings))
    await running.ready()
    poll = asyncio.create_task(running.dequeue(wait_seconds=30))
    await asyncio.sleep(0.2)
    started = time.monotonic()
    running._stop.set()  # pyright: ignore[reportPrivateUsage]
    assert await poll == []
    await running.task
    assert time.monotonic() - started < 10
    await running.http.aclose()

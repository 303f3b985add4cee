"""The assembler on the real broker: the barrier, restarts, dead letters, misrouted records, its pace."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from fulgurite.schemas import topics
from fulgurite.schemas.dead_letters import (
    HEADER_OFFSET,
    HEADER_PARTITION,
    HEADER_REASON,
    HEADER_STAGE,
    HEADER_TOPIC,
)
from fulgurite.schemas.errors import Fenced, SettingsError
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.streams.assembler import assembly as assembly_module
from fulgurite.streams.assembler.service import serve
from tests.consumers.poison import plain_builder, send_poison
from tests.streams.assembler_bus import Bus, assembling, connected, ids
from tests.streams.assembler_records import finished, llm_call, queued, reward, started, value


async def test_a_rollout_becomes_one_trajectory(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus, assembling(kafka_settings):
        await bus.rollout("r1", group_id="g1")
        [record] = await bus.until(topics.TRAJECTORIES, 1)
        assert record.key == b"g1"
        [trajectory] = await bus.trajectories()
        assert (trajectory.rollout_id, trajectory.status, trajectory.partial) == ("r1", "succeeded", "")
        assert (trajectory.reward, trajectory.queued_ns, trajectory.metadata) == (1.0, 7, {"label": "r1"})
        assert [sequence.token_ids for sequence in trajectory.sequences] == [[1, 2, 3, 4, 5]]
        assert trajectory.sequences[0].loss_mask == [0, 0, 1, 0, 1]


async def test_what_nobody_can_decode_stops_nothing(kafka_settings: KafkaSettings) -> None:
    """On none of its topics, after the start and before it, and neither what lies before nor behind is lost."""

    async def poison(bus: Bus) -> None:
        for topic in (topics.ROLLOUTS, topics.SPANS, topics.REWARDS):
            for partition in range(kafka_settings.partitions):
                await send_poison(bus.producer, kafka_settings.topic(topic), partition, b"{}", b"k")

    with plain_builder():
        async with connected(kafka_settings) as bus:
            await bus.rollout("r1")
            await poison(bus)
            await bus.rollout("r2")
            async with assembling(kafka_settings):
                await bus.until(topics.TRAJECTORIES, 2)
                await poison(bus)
                await bus.rollout("r3")
                await bus.until(topics.TRAJECTORIES, 3)
            found = await bus.trajectories()
    assert sorted(trajectory.rollout_id for trajectory in found) == ["r1", "r2", "r3"]
    assert all(trajectory.partial == "" and trajectory.reward == 1.0 for trajectory in found)
    assert all([sequence.token_ids for sequence in one.sequences] == [[1, 2, 3, 4, 5]] for one in found)


async def test_the_end_waits_for_spans_and_rewards_still_unread(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus:
        # The backlog is larger than what one fetch brings, and the end is the very last record.
        filler = "x" * 20_000
        for number in range(200):
            await bus.producer.send(
                kafka_settings.topic(topics.SPANS),
                value(llm_call("other", number, [1], [2]).model_copy(update={"output": filler})),
                b"r1",
            )
        await bus.rollout("r1")
        async with assembling(kafka_settings):
            await bus.until(topics.TRAJECTORIES, 1)
        [trajectory] = await bus.trajectories()
        assert (trajectory.calls, trajectory.reward, trajectory.partial) == (2, 1.0, "")


async def test_failed_and_cancelled_rollouts_have_trajectories_too(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus, assembling(kafka_settings):
        await bus.send(started("f"), llm_call("f", 1, [1], [2]), reward("f", 0.0))
        await bus.send(finished("f", status="failed", error="boom"))
        await bus.send(queued("c"), finished("c", attempt=0, status="cancelled"))
        await bus.until(topics.TRAJECTORIES, 2)
        found = {trajectory.rollout_id: trajectory for trajectory in await bus.trajectories()}
        assert (found["f"].status, found["f"].error, found["f"].reward) == ("failed", "boom", 0.0)
        assert (found["c"].status, found["c"].sequences, found["c"].reward) == ("cancelled", [], None)


async def test_restarts_neither_repeat_nor_lose(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus:
        await bus.send(started("open"), llm_call("open", 1, [1], [2]))
        for number in range(3):
            async with assembling(kafka_settings):
                await bus.rollout(f"r{number}")
                await bus.until(topics.TRAJECTORIES, number + 1)
        async with assembling(kafka_settings):
            await bus.send(llm_call("open", 2, [1, 2, 3], [4]), reward("open", 0.5), finished("open"))
            await bus.until(topics.TRAJECTORIES, 4)
        found = await bus.trajectories()
        assert ids(found) == ["open", "r0", "r1", "r2"]
        [trajectory] = [trajectory for trajectory in found if trajectory.rollout_id == "open"]
        assert trajectory.sequences[0].token_ids == [1, 2, 3, 4]
        assert await bus.read(topics.DEAD_LETTERS) == []


async def test_late_and_unknown_records_are_dead_letters_with_their_bytes(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus, assembling(kafka_settings, orphan_seconds=0.5):
        await bus.rollout("r1")
        await bus.until(topics.TRAJECTORIES, 1)
        late, ghost = llm_call("r1", 3, [1], [2]), reward("ghost", 1.0)
        await bus.send(late, ghost)
        await bus.producer.send_and_wait(kafka_settings.topic(topics.SPANS), b'{"span_id": "s", "name": "trace"}')
        await bus.producer.send_and_wait(kafka_settings.topic(topics.SPANS), b"not JSON", b"r1")
        letters = await bus.until(topics.DEAD_LETTERS, 2)
        await asyncio.sleep(1.5)
        letters = await bus.read(topics.DEAD_LETTERS)
    found = {dict(letter.headers)[HEADER_REASON]: letter for letter in letters}
    assert len(letters) == 2
    assert (found[b"late"].key, found[b"late"].value) == (b"r1", value(late))
    assert (found[b"unknown_rollout"].key, found[b"unknown_rollout"].value) == (b"ghost", value(ghost))
    headers = dict(found[b"late"].headers)
    assert headers[HEADER_TOPIC] == kafka_settings.topic(topics.SPANS).encode()
    assert headers[HEADER_STAGE] == b"assembler"
    assert headers[HEADER_PARTITION] in (b"0", b"1")
    assert headers[HEADER_OFFSET] == b"2"


async def test_records_in_a_wrong_partition_are_joined(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus, assembling(kafka_settings):
        for partition in (0, 1):
            rollout_id = f"r{partition}"
            await bus.send(started(rollout_id))
            await bus.send(llm_call(rollout_id, 1, [1], [2]), reward(rollout_id, 1.0), partition=0)
            await bus.send(llm_call(rollout_id, 2, [1, 2], [3]), partition=1)
            await bus.send(finished(rollout_id))
        await bus.until(topics.TRAJECTORIES, 2)
        assert [(t.calls, t.reward, t.partial) for t in await bus.trajectories()] == [(2, 1.0, "")] * 2


async def test_short_memory_reads_records_again(kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every value is let go of as soon as it was read.
    monkeypatch.setattr(assembly_module, "MAX_HELD_BYTES", 0)
    async with connected(kafka_settings) as bus, assembling(kafka_settings, orphan_seconds=1.0):
        await bus.send(llm_call("ghost", 1, [1], [2]))
        for number in range(20):
            await bus.rollout(f"r{number}")
        await bus.until(topics.TRAJECTORIES, 20)
        assert [(t.calls, t.reward, t.partial) for t in await bus.trajectories()] == [(2, 1.0, "")] * 20
        [letter] = await bus.until(topics.DEAD_LETTERS, 1)
        assert letter.value == value(llm_call("ghost", 1, [1], [2]))


async def test_topics_that_are_not_co_partitioned_are_refused(kafka_settings: KafkaSettings) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_settings.bootstrap_servers)
    await admin.start()
    name = kafka_settings.topic(topics.REWARDS)
    await admin.create_partitions({name: NewPartitions(3)})
    while len((await admin.describe_topics([name]))[0]["partitions"]) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await admin.close()
    with pytest.raises(SettingsError, match="rewards has 3"):
        await asyncio.wait_for(serve(Settings(kafka=kafka_settings), asyncio.Event()), 20)


async def test_a_second_assembler_takes_over(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus:
        first = asyncio.create_task(serve(Settings(kafka=kafka_settings), asyncio.Event()))
        await bus.rollout("r0")
        await bus.until(topics.TRAJECTORIES, 1)
        async with assembling(kafka_settings):
            for number in range(1, 6):
                await bus.rollout(f"r{number}")
                await bus.until(topics.TRAJECTORIES, number + 1)
            with pytest.raises(Fenced):
                await asyncio.wait_for(first, 20)
        assert ids(await bus.trajectories()) == [f"r{number}" for number in range(6)]


async def _publish_many(bus: Bus, count: int) -> None:
    names = [f"r{number}" for number in range(count)]
    for step in (
        [(topics.ROLLOUTS, started(name)) for name in names],
        [(topics.SPANS, llm_call(name, 1, range(1, 200), range(200, 230))) for name in names],
        [(topics.SPANS, llm_call(name, 2, range(1, 240), range(240, 260))) for name in names],
        [(topics.REWARDS, reward(name, 1.0)) for name in names],
        [(topics.ROLLOUTS, finished(name)) for name in names],
    ):
        sent = [
            await bus.producer.send(bus.settings.topic(topic), value(event), event.rollout_id.encode())
            for topic, event in step
        ]
        await asyncio.gather(*sent)


async def test_thousands_of_rollouts_and_the_delay_of_one(kafka_settings: KafkaSettings) -> None:
    count = 3_000
    async with connected(kafka_settings) as bus:
        await _publish_many(bus, count)
        begun = time.monotonic()
        async with assembling(kafka_settings):
            await bus.until(topics.TRAJECTORIES, count, seconds=90)
            print(f"\n{count / (time.monotonic() - begun):.0f} rollouts/s from a backlog")  # noqa: T201
            for number in range(40):
                await bus.rollout(f"single{number}")
            await bus.until(topics.TRAJECTORIES, count + 40)
        records = await bus.read(topics.TRAJECTORIES)
        found = await bus.trajectories()
    assert len({trajectory.rollout_id for trajectory in found}) == len(found) == count + 40
    assert all(trajectory.partial == "" and len(trajectory.sequences) == 1 for trajectory in found)
    # The broker stamps the trajectory when it is appended, before the commit.
    delays = sorted(
        record.timestamp / 1_000 - trajectory.finished_ns / 1e9
        for record, trajectory in zip(records, found, strict=True)
        if trajectory.rollout_id.startswith("single")
    )
    print(f"finished -> appended: median {delays[20] * 1e3:.0f} ms, p90 {delays[36] * 1e3:.0f} ms")  # noqa: T201
    assert delays[20] < 1.0

"""Records that nobody can decode: readers of streams go past them, and count them as read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Undecodable
from fulgurite.schemas import topics
from fulgurite.schemas.algorithms import AlgorithmState
from fulgurite.schemas.codec import encode
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings, SourceSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.training import RunFinished
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.memory import Unreadable, open_groups, remembered, remembering
from fulgurite.streams.algorithms.prompts import serve
from fulgurite.streams.algorithms.prompts.reading import results_of, spans_of
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.source import SourceLedger
from tests.consumers.poison import poison
from tests.streams.algorithms.algorithms_bus import until
from tests.streams.algorithms.judge_server import ModelServer
from tests.streams.algorithms.test_prompts import RUN, settings_for
from tests.streams.trainer_world import read_topic

FINISHED = RunFinished(run_id="run", step=3, resource="policy", version=4)


def _nobody() -> ModelServer:
    """A critic that is away."""
    server = ModelServer(str)
    server.url = "http://127.0.0.1:9"
    return server


async def send(kafka: KafkaSettings, topic: topics.Topic, value: bytes, key: bytes = b"k", partition: int = 0) -> None:
    async with AIOKafkaProducer(**connection_options(kafka)) as producer:
        await producer.send_and_wait(kafka.topic(topic), value, key, partition)


async def test_trajectories_lie_behind_them_and_offsets_count_them(kafka_settings: KafkaSettings) -> None:
    topic = topics.TRAJECTORIES
    await send(kafka_settings, topic, b"first")
    await poison(kafka_settings, topic, b"odd")
    await send(kafka_settings, topic, b"last")
    reader = TrajectoryReader(kafka_settings, kafka_settings.topic(topic))
    await reader.start()
    try:
        await reader.seek({})
        found: list[tuple[int, int, bytes | None, bool]] = []
        async with asyncio.timeout(20):
            while not await reader.caught_up():
                found += [
                    (record.partition, record.offset, record.value, isinstance(record, Undecodable))
                    for record in await reader.poll(0.2)
                ]
        lying = [(0, 0, b"first", False), (0, 1, b"odd", True), (0, 2, b"last", False), (1, 0, b"odd", True)]
        assert sorted(found) == lying
        assert reader.offsets == {0: 3, 1: 1}
        assert [record.value for record in await reader.read_at(0, [0, 1, 2])] == [b"first", b"odd", b"last"]
    finally:
        await reader.close()


async def test_a_ledger_and_a_search_for_a_prompt_go_past_them(kafka_settings: KafkaSettings) -> None:
    await poison(kafka_settings, topics.TRAINING, encode(FINISHED.model_copy(update={"step": 9})), b"run")
    await send(kafka_settings, topics.TRAINING, encode(FINISHED), b"run")
    ledger = SourceLedger(kafka_settings, SourceSettings(run_id="run"))
    await ledger.start({})
    async with asyncio.timeout(20):
        while (event := await ledger.next(0.2)) is None:
            pass
    assert (event, ledger.offsets[0]) == (FINISHED, 2)
    await ledger.close()

    ended = Trajectory(rollout_id="run-r", run_id="run", status="succeeded", reward=1.0)
    await poison(kafka_settings, topics.TRAJECTORIES, encode(ended.model_copy(update={"reward": 0.0})))
    await send(kafka_settings, topics.TRAJECTORIES, encode(ended))
    reader = TrajectoryReader(kafka_settings, kafka_settings.topic(topics.TRAJECTORIES))
    await reader.start()
    await reader.seek({})
    assert (await results_of(reader, "run", ["run-r"], 20.0))["run-r"].reward == 1.0
    await reader.close()

    said = Span(rollout_id="run-r", attempt_id="a", span_id="s", name="n", start_ns=1, end_ns=2)
    await poison(kafka_settings, topics.SPANS, encode(said.model_copy(update={"span_id": "odd"})))
    await send(kafka_settings, topics.SPANS, encode(said))
    spans = await spans_of(kafka_settings, {0: 0, 1: 0}, {"run-r": "a"}, "run")
    assert [span.span_id for span in spans["run-r"]] == ["s"]


async def test_what_an_algorithm_remembers_is_read_past_them(kafka_settings: KafkaSettings) -> None:
    for rollout_id in ("a", "b"):
        await send(kafka_settings, topics.TRAJECTORIES, encode(Trajectory(rollout_id=rollout_id, status="succeeded")))
    await poison(kafka_settings, topics.TRAJECTORIES)
    state = {"members": [[0, 0], [0, 2]]}
    record = remembering(kafka_settings, "own", "group", state)
    async with AIOKafkaProducer(**connection_options(kafka_settings)) as producer:
        await producer.send_and_wait(record.topic, record.value, record.key)
    await poison(kafka_settings, topics.ALGORITHM_STATE, b"{}", b"own/other")
    found = await remembered(kafka_settings, "own")
    assert found.pop("group") == state
    assert isinstance(found.pop("other"), Unreadable)
    assert found == {}
    group, other = sorted(await open_groups(kafka_settings, "own"), key=lambda each: each.group_id)
    assert list(group.members) == ["a"], "at offset 2 lies what nobody can decode"
    assert (other.group_id, other.given, other.members) == ("other", True, {}), "it may have been given before"


@pytest.mark.parametrize("is_decodable", [False, True])
async def test_a_search_that_cannot_be_read_is_not_begun_anew(
    kafka_settings: KafkaSettings, tmp_path: Path, is_decodable: bool
) -> None:
    """Nor does another search's record stop one."""
    key = f"prompt/{RUN}".encode()
    if is_decodable:
        of_no_round = AlgorithmState(algorithm="prompt", name=RUN, value={"round": -1})
        await send(kafka_settings, topics.ALGORITHM_STATE, encode(of_no_round), key)
    else:
        await poison(kafka_settings, topics.ALGORITHM_STATE, b"{}", key)
    settings = settings_for(kafka_settings, _nobody(), tmp_path)
    with pytest.raises(StartError, match=rf"search {RUN} remembers cannot be read .* key prompt/{RUN}$"):
        await asyncio.wait_for(serve(settings, asyncio.Event()), 20)
    assert await read_topic(kafka_settings, topics.ROLLOUTS) == []
    other = settings.model_copy(update={"prompt": settings.prompt.model_copy(update={"run_id": "another"})})
    stop = asyncio.Event()
    searching = asyncio.create_task(serve(other, stop))
    assert await until(kafka_settings, topics.ROLLOUTS, 1)
    stop.set()
    await searching

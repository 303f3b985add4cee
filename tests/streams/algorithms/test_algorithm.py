"""A user's own algorithm against the real broker: exactly once, in order, with groups, failures and restarts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from examples.algorithms import best_of_group as example
from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode, encode
from fulgurite.schemas.dead_letters import HEADER_OFFSET, HEADER_REASON, HEADER_STAGE
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.rewards import HEADER_AFTER_END, Reward
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms import algorithm
from fulgurite.streams.algorithms.definition import load_algorithm
from fulgurite.streams.algorithms.memory import Start
from fulgurite.streams.algorithms.work import AlgorithmFailed
from tests.consumers.poison import poison
from tests.streams.algorithms.algorithms_bus import at_work, send, trajectory, until
from tests.streams.trainer_world import read_topic


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@algorithm(run_id="ours")
async def echo(given: Trajectory) -> AsyncIterator[Reward]:
    await asyncio.sleep(0.02 if given.rollout_id.endswith("0") else 0)  # the later one is done first
    yield Reward(rollout_id=given.rollout_id, name="echo", value=given.reward or 0.0)


async def rewards(kafka: KafkaSettings, count: int) -> list[Reward]:
    return [decode(Reward, record.value) for record in await until(kafka, topics.REWARDS, count)]


async def test_the_example_is_short_and_names_the_best(kafka_settings: KafkaSettings) -> None:
    assert len(inspect.getsource(example).splitlines()) < 30
    # Without a reward is not as good as 0.
    group = [trajectory(f"g-r{i}", group_id="g", group_size=3, reward=(-1.0, None, -0.5)[i]) for i in range(3)]
    others = [trajectory("h-r0", group_id="h", group_size=2), trajectory("v", mode="val", group_size=1)]
    alone = [trajectory("s", group_id="s", group_size=1), trajectory("t")]
    loaded = load_algorithm("examples.algorithms.best_of_group:best_of_group")
    async with at_work(kafka_settings, loaded):
        await send(kafka_settings, topics.TRAJECTORIES, *alone, group[2], others[0], group[0], others[1], group[1])
        (record,) = await until(kafka_settings, topics.REWARDS, 1)
    assert await read_topic(kafka_settings, topics.DEAD_LETTERS) == [], "one alone is no group, and is given to nobody"
    reward = decode(Reward, record.value)
    assert (reward.rollout_id, reward.name, reward.value) == ("g-r2", "best_of_group", 0.5)
    assert HEADER_AFTER_END in dict(record.headers)


async def test_only_the_selection_is_given_in_the_order_of_the_log(kafka_settings: KafkaSettings) -> None:
    ours = [trajectory(f"r{i}", run_id="ours", group_id="one-partition") for i in range(20)]
    theirs = [trajectory(f"t{i}", run_id="theirs") for i in range(5)]
    await send(kafka_settings, topics.TRAJECTORIES, *theirs, *ours, b"not json")
    async with at_work(kafka_settings, echo):
        records = await until(kafka_settings, topics.REWARDS, 20)
    for partition in range(2):
        found = [int(record.key[1:]) for record in records if record.partition == partition]
        assert found == sorted(found)
    assert sorted(record.key for record in records) == sorted(given.rollout_id.encode() for given in ours)
    assert await read_topic(kafka_settings, topics.DEAD_LETTERS) == []


async def test_killed_at_every_step_in_turn_it_publishes_each_once(kafka_settings: KafkaSettings) -> None:
    sent: list[Trajectory] = []
    # The offsets to begin with are a transaction of their own: it dies in that one first.
    for step in ["fenced", "begun", "restored", "read", "taken", "begun", "sent", "committed", "done"]:

        def hook(at: str, dies_at: str = step) -> None:
            if at == dies_at:
                raise Killed

        new = [trajectory(f"r{len(sent) + i}", run_id="ours") for i in range(5)]
        await send(kafka_settings, topics.TRAJECTORIES, *new)
        sent += new
        async with at_work(kafka_settings, echo, hook=hook) as task:
            done, _ = await asyncio.wait({task}, timeout=20)
            assert done
            assert isinstance(task.exception(), Killed)
    async with at_work(kafka_settings, echo, "latest"):  # ignored: it goes on where it stood
        found = await rewards(kafka_settings, len(sent))
    assert sorted(reward.rollout_id for reward in found) == sorted(given.rollout_id for given in sent)


async def test_open_groups_survive_a_restart_and_close_by_deadline(kafka_settings: KafkaSettings) -> None:
    given: list[list[str]] = []

    @algorithm(reads="groups")
    def seen(group: list[Trajectory]) -> Iterator[Reward]:
        given.append([member.rollout_id for member in group])
        yield Reward(rollout_id=group[0].rollout_id, name="size", value=len(group))

    members = {name: [trajectory(f"{name}{i}", group_id=name, group_size=3) for i in range(3)] for name in "abc"}
    await send(kafka_settings, topics.TRAJECTORIES, *members["a"][:2], members["b"][0], *members["c"])
    async with at_work(kafka_settings, seen):
        await until(kafka_settings, topics.REWARDS, 1)
        await until(kafka_settings, topics.ALGORITHM_STATE, 4)
    assert given == [["c0", "c1", "c2"]]
    await send(kafka_settings, topics.TRAJECTORIES, members["b"][1])
    async with at_work(kafka_settings, seen, group_deadline_seconds=2):
        await send(kafka_settings, topics.TRAJECTORIES, members["a"][2])
        await until(kafka_settings, topics.REWARDS, 2)
        await until(kafka_settings, topics.REWARDS, 3)
    assert sorted(given[1:]) == [["a0", "a1", "a2"], ["b0", "b1"]]
    pair = [trajectory(f"e{i}", group_id="e", group_size=2) for i in range(2)]
    await send(kafka_settings, topics.TRAJECTORIES, members["b"][2], trajectory("d", group_size=1), *pair)
    async with at_work(kafka_settings, seen):
        await until(kafka_settings, topics.REWARDS, 4)
    assert given[3:] == [["e0", "e1"]], "a late member is nobody's group, and one alone is none"


async def test_what_fails_becomes_a_dead_letter_and_the_next_ones_turn_comes(kafka_settings: KafkaSettings) -> None:
    tried: list[str] = []

    @algorithm()
    def picky(given: Trajectory) -> Any:
        tried.append(given.rollout_id)
        if given.rollout_id == "bad":
            raise ValueError("not this one")
        return None if given.rollout_id == "none" else Reward(rollout_id=given.rollout_id, value=1)

    sent = [trajectory("bad"), trajectory("none"), trajectory("good")]
    await poison(kafka_settings, topics.TRAJECTORIES, encode(trajectory("undecodable")))
    await send(kafka_settings, topics.TRAJECTORIES, *sent)
    await poison(kafka_settings, topics.ALGORITHM_STATE, b"{}", b"picky/group")
    async with at_work(kafka_settings, picky, tries=2):
        (letter,) = await until(kafka_settings, topics.DEAD_LETTERS, 1)
        assert [reward.rollout_id for reward in await rewards(kafka_settings, 1)] == ["good"]
    headers = dict(letter.headers)
    assert sorted(tried) == ["bad", "bad", "good", "none"]
    assert headers[HEADER_REASON] == b"algorithm_failed"
    assert headers[HEADER_STAGE] == b"algorithm:picky"
    assert headers[HEADER_OFFSET].isdigit()
    assert decode(Trajectory, letter.value).rollout_id == "bad"


async def test_it_stops_where_it_should_and_goes_on_there(kafka_settings: KafkaSettings) -> None:
    broken = True

    @algorithm()
    def fragile(given: Trajectory) -> Reward:
        if broken and given.rollout_id == "r1":
            raise RuntimeError("broken")
        return Reward(rollout_id=given.rollout_id, value=1)

    sent = [trajectory(f"r{i}", group_id="one-partition") for i in range(3)]
    await send(kafka_settings, topics.TRAJECTORIES, *sent)
    async with at_work(kafka_settings, fragile, tries=1, on_error="stop") as task:
        await asyncio.wait({task}, timeout=20)
        with pytest.raises(AlgorithmFailed, match=r"fragile failed with .*trajectories-.*broken"):
            task.result()
    assert [reward.rollout_id for reward in await rewards(kafka_settings, 1)] == ["r0"], "what came before is done"
    broken = False
    async with at_work(kafka_settings, fragile, on_error="stop"):
        found = await rewards(kafka_settings, 3)
    assert sorted(reward.rollout_id for reward in found) == ["r0", "r1", "r2"]


async def test_it_does_not_read_its_own_words(kafka_settings: KafkaSettings) -> None:
    @algorithm(reads="rewards")
    def twice(given: Reward) -> Reward:
        return Reward(rollout_id=given.rollout_id, name="twice", value=2 * given.value)

    lines = b"\n".join(Reward(rollout_id="r", value=i).model_dump_json().encode() for i in range(3))
    await send(kafka_settings, topics.REWARDS, lines)
    async with at_work(kafka_settings, twice):
        await until(kafka_settings, topics.REWARDS, 4)
        await send(kafka_settings, topics.REWARDS, Reward(rollout_id="last", value=10))
        records = await until(kafka_settings, topics.REWARDS, 6)
    found = [decode(Reward, line) for record in records for line in record.value.split(b"\n")]
    assert sorted(reward.value for reward in found if reward.name == "twice") == [0, 2, 4, 20]


@pytest.mark.parametrize(("at", "expected"), [("beginning", 6), ("latest", 2), ("2", 4), ("2100-01-01", 2)])
async def test_where_it_begins(kafka_settings: KafkaSettings, at: str, expected: int) -> None:
    before = [trajectory(f"r{i}", run_id="ours", group_id="one-partition") for i in range(4)]
    after = [trajectory(f"s{i}", run_id="ours", group_id="one-partition") for i in range(2)]
    await send(kafka_settings, topics.TRAJECTORIES, *before)
    ready = asyncio.Event()
    async with at_work(kafka_settings, echo, at, lambda step: ready.set() if step == "restored" else None):
        await asyncio.wait_for(ready.wait(), 20)
        await send(kafka_settings, topics.TRAJECTORIES, *after)
        found = await rewards(kafka_settings, expected)
    assert len(found) == expected


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(SettingsError, match="yesterday"):
        Start.parse("yesterday")
    with pytest.raises(SettingsError, match="cannot be called"):
        algorithm()(lambda: None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="reads"):
        algorithm(name="x", reads="weights")(lambda given: None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="write @algorithm"):
        load_algorithm("examples.calculator.reward:reward_of")

"""Rewards that come as OTLP, on the real broker, with the real translator: late, away, never there, and restarts."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import httpx
import pytest

from fulgurite.schemas import topics
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.trajectories import Trajectory
from tests.streams.assembler_bus import (
    Bus,
    add_partition,
    assembling,
    connected,
    ids,
    known_translator,
    translated,
    translating,
)

QUICK: dict[str, Any] = {"otlp_settle_seconds": 0.2}


async def outcome(bus: Bus) -> dict[str, tuple[float | None, str]]:
    found = await bus.trajectories()
    assert len(ids(found)) == len(set(ids(found))), "one twice"
    return {one.rollout_id: (one.reward, one.partial) for one in found}


async def test_a_reward_in_otlp_is_waited_for_while_the_translator_is_away(kafka_settings: KafkaSettings) -> None:
    await known_translator(kafka_settings)
    async with connected(kafka_settings) as bus, assembling(kafka_settings, **QUICK):
        await bus.reward_as_otlp("waits", 0.5)
        await bus.ends_without("waits")
        for number in range(4):  # in both partitions: some lie behind the one that waits
            await bus.rollout(f"native{number}")
        await bus.until(topics.TRAJECTORIES, 4)
        await asyncio.sleep(1.5)
        assert await outcome(bus) == {f"native{number}": (1.0, "") for number in range(4)}
        async with translating(kafka_settings):
            await bus.until(topics.TRAJECTORIES, 5)
        assert (await outcome(bus))["waits"] == (0.5, "")
        assert await bus.read(topics.DEAD_LETTERS) == []


async def test_a_reward_that_a_collector_has_at_the_end_is_not_late(kafka_settings: KafkaSettings) -> None:
    """It is on otlp_spans only after the assembler has read the end of its rollout."""
    await known_translator(kafka_settings)
    async with connected(kafka_settings) as bus, translating(kafka_settings), assembling(kafka_settings):
        for number in range(5):
            await bus.ends_without(f"r{number}")
            await asyncio.sleep(0.2)
            await bus.reward_as_otlp(f"r{number}", 0.5)
        await bus.until(topics.TRAJECTORIES, 5)
        assert await outcome(bus) == {f"r{number}": (0.5, "") for number in range(5)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def test_a_translator_that_never_comes_is_waited_for_so_long_and_it_shows(
    kafka_settings: KafkaSettings, caplog: pytest.LogCaptureFixture
) -> None:
    await known_translator(kafka_settings)
    port = free_port()
    own: dict[str, Any] = QUICK | {"otlp_wait_seconds": 3.0, "metrics_port": port}

    async def metrics() -> dict[str, float]:
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics/")).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("fulgurite_assembler_"): float(value) for name, value in lines}

    async with connected(kafka_settings) as bus, assembling(kafka_settings, **own):
        await bus.reward_as_otlp("lost", 0.5)
        begun = time.monotonic()
        await bus.ends_without("lost")
        await asyncio.sleep(1.5)
        said = await metrics()
        assert (said["otlp_in_use"], said["otlp_waiting_rollouts"], said["otlp_overdue_total"]) == (1, 1, 0)
        await bus.until(topics.TRAJECTORIES, 1)
        assert time.monotonic() - begun >= 3.0
        assert await outcome(bus) == {"lost": (None, "no_reward")}
        said = await metrics()
        assert (said["otlp_waiting_rollouts"], said["otlp_waited_total"], said["otlp_overdue_total"]) == (0, 1, 1)
        assert (said["trajectories_total"], said['dead_letters_total{reason="late"}']) == (1, 0)
        async with translating(kafka_settings):  # as before: the tables have it, the trajectory has not
            await bus.until(topics.DEAD_LETTERS, 1)
        assert (await metrics())['dead_letters_total{reason="late"}'] == 1
    [warned] = [each.getMessage() for each in caplog.records if "otlp_wait_seconds" in each.getMessage()]
    assert "1 rollouts waited 3 s" in warned
    assert "has 1 records to read" in warned


async def test_where_there_is_no_translator_nobody_waits(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus, assembling(kafka_settings):
        await bus.reward_as_otlp("r", 0.5)
        begun = time.monotonic()
        await bus.ends_without("r")
        await bus.until(topics.TRAJECTORIES, 1)
        assert time.monotonic() - begun < 10
        assert await outcome(bus) == {"r": (None, "no_reward")}


async def test_the_wait_can_be_turned_off(kafka_settings: KafkaSettings) -> None:
    await known_translator(kafka_settings)
    async with connected(kafka_settings) as bus, assembling(kafka_settings, otlp_wait_seconds=0):
        await bus.reward_as_otlp("r", 0.5)
        await bus.ends_without("r")
        await bus.until(topics.TRAJECTORIES, 1)
        assert await outcome(bus) == {"r": (None, "no_reward")}


async def test_a_restart_waits_on_and_repeats_nobody(kafka_settings: KafkaSettings) -> None:
    await known_translator(kafka_settings)
    async with connected(kafka_settings) as bus:
        await bus.reward_as_otlp("waits", 0.5)
        await bus.ends_without("waits")
        for number in range(3):
            async with assembling(kafka_settings, **QUICK):
                await bus.rollout(f"a{number}")
                await bus.rollout(f"b{number}")
                await bus.until(topics.TRAJECTORIES, 2 * (number + 1))
        assert "waits" not in await outcome(bus)
        async with assembling(kafka_settings, **QUICK), translating(kafka_settings):
            await bus.until(topics.TRAJECTORIES, 7)
        found = await outcome(bus)
        assert found.pop("waits") == (0.5, "")
        assert set(found.values()) == {(1.0, "")}
        assert await bus.read(topics.DEAD_LETTERS) == []


async def test_the_first_translator_of_all_is_noticed(kafka_settings: KafkaSettings) -> None:
    async with connected(kafka_settings) as bus, assembling(kafka_settings, **QUICK):
        await bus.rollout("before")
        await bus.until(topics.TRAJECTORIES, 1)
        await known_translator(kafka_settings)
        await asyncio.sleep(2.0)
        await bus.reward_as_otlp("waits", 0.5)
        await bus.ends_without("waits")
        await asyncio.sleep(1.0)
        async with translating(kafka_settings):
            await bus.until(topics.TRAJECTORIES, 2)
        assert (await outcome(bus))["waits"] == (0.5, "")


async def test_rollouts_that_get_no_reward_wait_only_until_the_translator_has_looked(
    kafka_settings: KafkaSettings,
) -> None:
    await known_translator(kafka_settings)
    async with connected(kafka_settings) as bus, translating(kafka_settings), assembling(kafka_settings, **QUICK):
        for number in range(10):
            await bus.ends_without(f"r{number}")
        begun = time.monotonic()
        await bus.until(topics.TRAJECTORIES, 10)
        assert time.monotonic() - begun < 10
        found: list[Trajectory] = await bus.trajectories()
    assert {one.partial for one in found} == {"no_reward"}


async def test_the_translator_commits_where_it_stands_also_behind_what_is_no_record(
    kafka_settings: KafkaSettings,
) -> None:
    """Else whoever waits until it has reached the end of the log would wait for ever."""
    async with connected(kafka_settings) as bus, translating(kafka_settings):
        async with asyncio.timeout(30):
            while await translated(kafka_settings) != {0: 0, 1: 0}:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        # A record, and the marker of its transaction: the log ends at 2.
        await bus.in_transaction(topics.OTLP_SPANS, b"{}", partition=1)
        async with asyncio.timeout(30):
            while await translated(kafka_settings) != {0: 0, 1: 2}:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


async def test_the_translator_soon_reads_partitions_that_are_added(kafka_settings: KafkaSettings) -> None:
    """Rollouts wait for what lies there, too."""
    async with connected(kafka_settings) as bus, translating(kafka_settings):
        async with asyncio.timeout(30):
            while len(await translated(kafka_settings)) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await add_partition(kafka_settings, topics.OTLP_SPANS)
        await bus.in_transaction(topics.OTLP_SPANS, b"{}", partition=2)
        async with asyncio.timeout(30):
            while (await translated(kafka_settings)).get(2) != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

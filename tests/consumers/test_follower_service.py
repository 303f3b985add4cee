"""The follower's process against the real broker: the topic in, servers converged, `training` out, and kill -9."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from fsspec.implementations.memory import MemoryFileSystem
from starlette.requests import Request
from starlette.responses import Response

from fulgurite.consumers.follower import serve
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings, KafkaSettings, Settings
from fulgurite.schemas.topics import DEAD_LETTERS, RESOURCES, TRAINING, Topic
from fulgurite.schemas.training import VersionApplied
from tests.consumers.poison import poison
from tests.producers.fake_policy_server import FakePolicyServer, until


def make_version(folder: Path, number: int, resource: str = "policy") -> ResourceVersion:
    files = folder / f"{resource}-v{number}"
    files.mkdir()
    (files / "weights.txt").write_text(str(number * 10))
    return ResourceVersion(
        resource=resource, version=number, uri=files.as_uri(), sha256=folder_sha256(files), run_id="run"
    )


def configured(kafka: KafkaSettings, *servers: FakePolicyServer) -> Settings:
    return Settings(kafka=kafka, follower=FollowerSettings(servers=[s.url for s in servers], check_seconds=0.1))


def with_cache(settings: Settings, folder: Path, port: int = 0) -> Settings:
    follower = settings.follower.model_copy(update={"cache_folder": folder / "cache", "port": port})
    return settings.model_copy(update={"follower": follower})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def records(kafka: KafkaSettings, topic: Topic, count: int) -> list[ConsumerRecord[bytes, bytes]]:
    """The first `count` records of the topic."""
    consumer = AIOKafkaConsumer(
        kafka.topic(topic),
        **connection_options(kafka),
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await consumer.start()
    try:
        async with asyncio.timeout(20):
            return [await consumer.getone() for _ in range(count)]
    finally:
        await consumer.stop()


@asynccontextmanager
async def following(settings: Settings) -> AsyncGenerator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        yield
        assert not task.done(), task
    finally:
        stop.set()
        async with asyncio.timeout(5):
            await task


async def test_versions_on_the_topic_reach_every_server(kafka_settings: KafkaSettings, tmp_path: Path):
    async with FakePolicyServer() as one, FakePolicyServer() as two, Publisher(kafka_settings) as publisher:
        for version in (make_version(tmp_path, 1), make_version(tmp_path, 2), make_version(tmp_path, 9, "other")):
            await (await publisher.publish(RESOURCES, version.resource, version))
        async with following(configured(kafka_settings, one, two)):
            await until(lambda: one.label == two.label == "2")
            assert one.log.count("/collective_rpc") == 1, "the log is read before anything is loaded"
            version = make_version(tmp_path, 3)
            await (await publisher.publish(RESOURCES, version.resource, version))
            await until(lambda: one.label == two.label == "3")
            assert one.weights == two.weights == 30
            found = [decode(VersionApplied, record.value) for record in await records(kafka_settings, TRAINING, 4)]
    assert sorted((event.server, event.version) for event in found) == sorted(
        (server.url, number) for server in (one, two) for number in (2, 3)
    )
    assert all(event.ok and event.seconds for event in found)


async def test_a_record_that_is_no_version_becomes_a_dead_letter_and_stops_nothing(
    kafka_settings: KafkaSettings, tmp_path: Path
):
    async with FakePolicyServer() as server, Publisher(kafka_settings) as publisher:
        await (await publisher.publish_bytes(RESOURCES, b"policy", b"{not json", [("odd", b"\xff\xfe")]))
        await (await publisher.publish_bytes(RESOURCES, b"policy", b'{"resource": "policy", "version": -1}'))
        await (await publisher.publish_bytes(RESOURCES, b"policy", None))
        version = make_version(tmp_path, 1)
        await (await publisher.publish(RESOURCES, "policy", version))
        async with following(configured(kafka_settings, server)):
            await until(lambda: server.label == "1")
            reused = make_version(tmp_path, 2).model_copy(update={"version": 1})
            await (await publisher.publish(RESOURCES, "policy", reused))
            await records(kafka_settings, DEAD_LETTERS, 3)
            await poison(kafka_settings, RESOURCES, b'{"resource": "policy", "version": 3}', b"policy")
            dead = await records(kafka_settings, DEAD_LETTERS, 4)
    assert [record.value for record in dead][:2] == [b"{not json", b'{"resource": "policy", "version": -1}']
    headers = [{name: value.decode() for name, value in record.headers} for record in dead]
    assert [h["__connect.errors.exception.class.name"] for h in headers] == [
        "not_json",
        "bad_field",
        "version_reused",
        "undecodable",
    ]
    assert [h["__connect.errors.offset"] for h in headers] == ["0", "1", "4", "5"]
    assert (server.label, server.weights) == ("1", 10)
    assert {h["__connect.errors.stage"] for h in headers} == {"follower"}


async def test_versions_in_an_object_store_reach_servers_and_the_metrics_say_so(
    kafka_settings: KafkaSettings, tmp_path: Path
):
    async with FakePolicyServer() as one, FakePolicyServer() as two, Publisher(kafka_settings) as publisher:
        version = make_version(tmp_path, 7)
        uri = f"memory://{tmp_path.name}/policy/v7"
        MemoryFileSystem().put(str(tmp_path / "policy-v7"), uri, recursive=True)
        await (await publisher.publish(RESOURCES, "policy", version.model_copy(update={"uri": uri})))
        settings = with_cache(configured(kafka_settings, one, two), tmp_path, free_port())
        async with following(settings), aiohttp.ClientSession(f"http://127.0.0.1:{settings.follower.port}") as session:
            await until(lambda: one.label == two.label == "7")
            async with asyncio.timeout(10):
                while (await session.get("/ready")).status != 200:  # noqa: ASYNC110 (another process says when)
                    await asyncio.sleep(0.05)
            text = await (await session.get("/metrics/")).text()
            found = [decode(VersionApplied, record.value) for record in await records(kafka_settings, TRAINING, 2)]
    assert one.weights == two.weights == 70
    assert f'fulgurite_follower_served_version{{server="{one.url}"}} 7.0' in text
    assert [(event.version, event.ok) for event in found] == [(7, True)] * 2
    assert (tmp_path / "cache" / "policy" / "served.json").is_file()


async def test_a_stop_does_not_wait_for_a_long_fetch(
    kafka_settings: KafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slow(fs: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        time.sleep(0.05)
        return b"x" * (end - start)

    monkeypatch.setattr("fulgurite.consumers.follower.store.CHUNK_BYTES", 10)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", slow)
    uri = f"memory://{tmp_path.name}/policy/v7"
    MemoryFileSystem().pipe_file(f"{uri}/weights.txt", b"x" * 10_000)
    version = make_version(tmp_path, 7).model_copy(update={"uri": uri})
    async with FakePolicyServer() as server, Publisher(kafka_settings) as publisher:
        await (await publisher.publish(RESOURCES, "policy", version))
        async with following(with_cache(configured(kafka_settings, server), tmp_path)):
            await until(lambda: list(tmp_path.glob("cache/policy/.partial-*/weights.txt")))


async def test_a_taken_port_ends_the_service_and_says_so(kafka_settings: KafkaSettings, tmp_path: Path):
    async with FakePolicyServer() as server:
        settings = with_cache(configured(kafka_settings, server), tmp_path, server.port)
        with pytest.raises(StartError, match=str(server.port)):
            await serve(settings, asyncio.Event())


async def test_without_a_broker_nothing_is_touched_and_the_service_stops_promptly():
    """Another follower, which does have a broker, may be the one that has paused it."""
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    async with FakePolicyServer(paused=True) as server, following(configured(nowhere, server)):
        await asyncio.sleep(1)
        assert server.paused
        assert server.log == []


async def test_of_two_followers_one_acts_and_the_other_goes_on_when_it_ends(
    kafka_settings: KafkaSettings, tmp_path: Path
):
    @dataclass
    class Watched(FakePolicyServer):
        loading: int = 0

        async def _collective_rpc(self, request: Request) -> Response:
            self.loading += 1
            assert self.loading == 1, "two load into it at once"
            await asyncio.sleep(0.05)
            answer = await super()._collective_rpc(request)  # fails where it was resumed meanwhile
            self.loading -= 1
            return answer

    async with Watched() as server, Publisher(kafka_settings) as publisher:
        settings = configured(kafka_settings, server)
        lied: set[tuple[str, int]] = set()

        async def watch() -> None:
            while True:
                label = server.label or ""
                if not server.paused and label.isdecimal() and server.weights != int(label) * 10:
                    lied.add((label, server.weights))
                await asyncio.sleep(0)

        async def publish(number: int) -> None:
            await (await publisher.publish(RESOURCES, "policy", make_version(tmp_path, number)))
            await until(lambda: server.label == str(number) and not server.paused)

        watching = asyncio.create_task(watch())
        await (await publisher.publish(RESOURCES, "policy", make_version(tmp_path, 1)))
        async with following(settings):
            async with following(settings):
                for number in range(2, 12):
                    await publish(number)
                joined = server.log.count("/collective_rpc")
            await publish(12)  # whichever of them acted
            await publish(13)
        watching.cancel()
    assert not lied
    assert joined <= 13, "each version once, and once more for each time that another took over"


PROCESS = """
import json, sys
from fulgurite.consumers.follower import main
from fulgurite.schemas.settings import Settings
sys.exit(main(Settings.model_validate(json.loads(sys.argv[1]))))
"""


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("route", ["/pause", "/collective_rpc"])
async def test_kill_9_in_the_middle_of_a_swap(kafka_settings: KafkaSettings, tmp_path: Path, route: str):
    async with FakePolicyServer(label="1", weights=10) as server, Publisher(kafka_settings) as publisher:
        version = make_version(tmp_path, 2)
        await (await publisher.publish(RESOURCES, "policy", version))
        server.hold = (route, 1)
        settings = configured(kafka_settings, server).model_dump(mode="json", include={"kafka", "follower"})
        command = [sys.executable, "-c", PROCESS, json.dumps(settings)]
        killed = await asyncio.create_subprocess_exec(*command)
        async with asyncio.timeout(60):
            await server.held.wait()
        killed.send_signal(signal.SIGKILL)
        await killed.wait()
        assert server.paused
        assert server.label != "2"

        again = await asyncio.create_subprocess_exec(*command)
        try:
            await until(lambda: server.label == "2" and not server.paused, seconds=60)
            (event,) = [decode(VersionApplied, record.value) for record in await records(kafka_settings, TRAINING, 1)]
            assert (event.version, event.ok) == (2, True)
        finally:
            again.terminate()
            assert await asyncio.wait_for(again.wait(), 10) == 0
    assert server.weights == 20

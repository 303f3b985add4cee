"""Several servers: who may be paused when, one download for all, and whether their weights are the right ones."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal

import aiohttp
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from starlette.responses import Response

from fulgurite.consumers.follower.loading import Shared
from fulgurite.consumers.follower.tries import LOAD_TRIES
from fulgurite.schemas.resources import ResourceVersion
from tests.consumers.follower_support import FakeVllm, Follower, following, make_version, write_safetensors
from tests.producers.fake_policy_server import until


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@contextlib.asynccontextmanager
async def fleet(count: int, session: aiohttp.ClientSession, **settings: object) -> AsyncGenerator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FakeVllm()) for _ in range(count)]
        shared = Shared(following(servers[0], **settings))
        followers = [Follower(server, session, shared=shared) for server in servers]
        for follower in followers:
            await stack.enter_async_context(follower.running())
        yield Fleet(servers, followers, shared)


class Fleet:
    def __init__(self, servers: list[FakeVllm], followers: list[Follower], shared: Shared) -> None:
        self.servers = servers
        self.followers = followers
        self.shared = shared

    async def reach(self, version: ResourceVersion) -> None:
        self.shared.versions.add(version)
        await until(lambda: all((version.version, True) in f.outcome for f in self.followers))


def in_store(folder: Path, number: int) -> ResourceVersion:
    make_version(folder, number)
    uri = f"memory://{folder.name}/v{number}"
    MemoryFileSystem().put(str(folder / f"v{number}"), uri, recursive=True)
    return make_version(folder, number, uri=uri)


@pytest.mark.parametrize(("policy", "most"), [("rolling", 1), ("together", 3)])
async def test_as_many_servers_are_paused_at_once_as_the_setting_says(
    session: aiohttp.ClientSession, tmp_path: Path, policy: Literal["rolling", "together"], most: int
):
    async with fleet(3, session, rollout_policy=policy) as fl:
        await fl.reach(make_version(tmp_path, 1))
        paused: list[int] = []

        def count() -> Response | None:
            paused.append(sum(server.paused for server in fl.servers))
            return None

        for server in fl.servers:
            server.load_seconds = 0.3
            server.faults["/resume"] = count
        await fl.reach(make_version(tmp_path, 2))
        assert max(paused) == most


async def test_a_server_that_hangs_while_it_is_paused_keeps_nobody_waiting(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with fleet(2, session, request_seconds=0.3) as fl:
        one, two = fl.servers
        one.hold = ("/pause", 1)  # paused, and never says so
        await until(lambda: one.log and two.log)
        fl.shared.versions.add(make_version(tmp_path, 1))
        await until(lambda: two.label == "1", seconds=5)
        await until(lambda: one.label == "1" and not one.paused, seconds=5)


async def test_a_server_that_is_away_does_not_keep_others_waiting(session: aiohttp.ClientSession, tmp_path: Path):
    async with fleet(2, session) as fl:
        one, two = fl.servers
        await one.stop()
        fl.shared.versions.add(make_version(tmp_path, 1))
        await until(lambda: two.label == "1")
        await one.start()
        await until(lambda: one.label == "1")


async def test_all_servers_share_one_download(
    session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads: list[str] = []
    original = MemoryFileSystem.cat_file

    def counting(fs: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        reads.append(path)
        return original(fs, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    async with fleet(3, session, cache_folder=tmp_path / "cache") as fl:
        await fl.reach(in_store(tmp_path, 1))
        assert [server.weights for server in fl.servers] == [10, 10, 10]
    assert len(reads) == 1


async def test_trouble_with_the_store_is_retried_until_it_passes(
    session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    version = in_store(tmp_path, 1)
    original = MemoryFileSystem.cat_file
    troubles = iter([PermissionError("expired token"), ConnectionResetError("reset"), OSError("slow down")])

    def failing(fs: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        if error := next(troubles, None):
            raise error
        return original(fs, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    async with fleet(1, session, cache_folder=tmp_path / "cache") as fl:
        await fl.reach(version)
        assert fl.followers[0].outcome == [(1, True)]
    assert "expired token" in caplog.text


async def test_a_load_that_did_nothing_is_found_out_and_gets_no_label(session: aiohttp.ClientSession, tmp_path: Path):
    async with fleet(1, session) as fl:
        server = fl.servers[0]
        for number in (1, 2):
            write_safetensors(tmp_path / f"v{number}" / "model.safetensors", {"w": (4,)}, fill=number)
        await fl.reach(make_version(tmp_path, 1))
        server.loads = False
        fl.shared.versions.add(make_version(tmp_path, 2))
        await until(lambda: (2, False) in fl.followers[0].outcome)
        assert "same as before" in fl.followers[0].events[1].error
        assert server.log.count("/collective_rpc") >= 1 + LOAD_TRIES
        server.loads = True
        await until(lambda: server.label == "1" and server.weights == 10 and not server.paused)


async def test_files_with_the_same_weights_are_no_failed_load(session: aiohttp.ClientSession, tmp_path: Path):
    async with fleet(1, session) as fl:
        for number in (1, 2):
            write_safetensors(tmp_path / f"v{number}" / "model.safetensors", {"w": (4,)})
            (tmp_path / f"v{number}" / "tokenizer.json").write_text(str(number))
        await fl.reach(make_version(tmp_path, 1, weights=5))
        await fl.reach(make_version(tmp_path, 2, weights=5))
        assert fl.followers[0].outcome == [(1, True), (2, True)]


async def test_a_server_whose_weights_differ_from_its_twins_is_refused_the_label(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with fleet(2, session) as fl:
        one, two = fl.followers
        await fl.reach(make_version(tmp_path, 1))
        fl.servers[1].faults["/pause"] = lambda: Response(status_code=503)  # the other one goes first
        fl.shared.versions.add(make_version(tmp_path, 2))
        await until(lambda: (2, True) in one.outcome)
        fl.servers[1].salt = "a bit flipped"
        fl.servers[1].faults.clear()
        await until(lambda: (2, False) in two.outcome)
        assert fl.servers[0].url in two.events[-1].error
        fl.servers[1].salt = ""
        # The known versions are tried in turn: which of them is next, no one here knows.
        await until(lambda: fl.servers[1].label in ("1", "2") and not fl.servers[1].paused)


async def test_servers_of_different_precision_are_not_compared(session: aiohttp.ClientSession, tmp_path: Path):
    async with fleet(2, session) as fl:
        fl.servers[1].salt = "bfloat16"
        for number in (1, 2):
            await fl.reach(make_version(tmp_path, number))
        assert all(follower.outcome == [(1, True), (2, True)] for follower in fl.followers)


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (500, 2)])
async def test_without_hashes_a_version_is_served_all_the_same(
    session: aiohttp.ClientSession, tmp_path: Path, status: int, asked: int
):
    async with FakeVllm() as server:
        server.faults["/weight_checker"] = lambda: Response("no such thing", status)
        follower = Follower(server, session, make_version(tmp_path, 1))
        for number in (1, 2):
            follower.versions.add(make_version(tmp_path, number))
            await follower.loop.step()
        assert follower.outcome == [(1, True), (2, True)]
        assert server.log.count("/weight_checker") == asked, "a route that is not there is not asked again"


async def test_hashing_that_takes_too_long_is_tried_once(session: aiohttp.ClientSession, tmp_path: Path):
    async with fleet(1, session, request_seconds=0.3) as fl:
        server = fl.servers[0]
        server.hold = ("/weight_checker", 1)
        for number in (1, 2):
            await fl.reach(make_version(tmp_path, number))
        assert server.log.count("/weight_checker") == 1


async def test_the_metrics_say_who_is_behind(session: aiohttp.ClientSession, tmp_path: Path):
    async with fleet(2, session) as fl:
        metrics = fl.shared.metrics

        def value(name: str, follower: int) -> float | None:
            return metrics.registry.get_sample_value(f"fulgurite_follower_{name}", {"server": fl.servers[follower].url})

        assert value("served_version", 0) == -1
        await fl.reach(make_version(tmp_path, 1))
        assert not metrics.not_ready()
        assert value("behind_seconds", 0) == 0
        await fl.servers[1].stop()
        fl.shared.versions.add(make_version(tmp_path, 2))
        await until(lambda: value("served_version", 0) == 2)
        assert metrics.not_ready() == {fl.servers[1].url: "does not serve version 2"}
        assert (value("behind_seconds", 1) or 0) > 0
        fl.shared.versions.add(make_version(tmp_path, 3, sha256="0" * 64))
        await until(lambda: value("refused_total", 0) == 1)
        assert metrics.registry.get_sample_value("fulgurite_follower_newest_version") == 3
        assert value("applied_total", 0) == 2
        assert (value("troubles_total", 1) or 0) > 0

"""Files of an adapter stay until no request can be on it: by the server's own word, over restarts; else by a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import aiohttp
import pytest
from starlette.responses import Response

from fulgurite.consumers.follower import draining
from fulgurite.consumers.follower.draining import QUIET_SECONDS, Draining, Requests, requests_in
from fulgurite.consumers.follower.loading import Shared
from fulgurite.consumers.follower.server import PolicyServer, Refused, Unreachable
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings
from tests.consumers.follower_support import FakeVllm, Follower, following, make_version, vllm_metrics
from tests.producers.fake_policy_server import until

DRAIN_SECONDS = FollowerSettings().drain_seconds
SHORT_SECONDS = 0.1


class Told(PolicyServer):
    """A server that says what a test lets it say."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__("http://nowhere", session, 1.0)
        self.running = ["policy-v3"]
        self.waiting = 0
        self.error: Exception | None = None

    async def metrics(self) -> str:
        if self.error:
            raise self.error
        return vllm_metrics(self.running, self.waiting)


class Watch:
    """A Draining that is looked at once a second of a clock of its own."""

    def __init__(self, server: Told) -> None:
        self.server = server
        self.now = 1_000.0
        self.draining = Draining(server, FollowerSettings(), clock=lambda: self.now)
        self.draining.follow([3])

    async def passes(self, seconds: float, *, paused: bool = False) -> bool:
        """Whether the version is kept after so long."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 1.0, end)
            await self.draining.look(paused=paused)
        assert self.draining.kept ^ self.draining.over == {3}
        return self.draining.kept == {3}


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def watch(session: aiohttp.ClientSession) -> Watch:
    return Watch(Told(session))


def test_the_newest_sample_counts():
    assert requests_in(vllm_metrics([], 0)) == Requests(frozenset(), 0)
    assert requests_in(vllm_metrics(["policy-v3", "policy-v5"], 2)) == Requests(
        frozenset(["policy-v3", "policy-v5"]), 2
    )


def test_a_server_that_has_not_served_yet_tells_that_there_is_nothing():
    text = "\n".join(line for line in vllm_metrics([], 0).splitlines() if not line.startswith("vllm:lora_requests"))
    assert requests_in(text) == Requests(frozenset(), 0)


@pytest.mark.parametrize("family", ["vllm:lora_requests_info", "vllm:num_requests_waiting"])
def test_a_server_that_leaves_one_of_them_out_does_not_tell(family: str):
    assert requests_in("\n".join(line for line in vllm_metrics([], 0).splitlines() if family not in line)) is None


@pytest.mark.parametrize("text", ["", "<html>", "vllm:lora_requests_info{ 1\nvllm:num_requests_waiting{ 0\n"])
def test_what_cannot_be_read_does_not_tell(text: str):
    assert requests_in(text) is None


async def test_one_that_runs_is_kept_for_as_long_as_it_does(watch: Watch):
    assert await watch.passes(10 * DRAIN_SECONDS)
    watch.server.running = []
    assert await watch.passes(QUIET_SECONDS - 10)
    assert not await watch.passes(20)


async def test_one_without_requests_is_kept_until_nothing_can_be_on_its_way(watch: Watch):
    watch.server.running = []
    assert await watch.passes(2 * QUIET_SECONDS - 10)
    assert not await watch.passes(20)


async def test_a_queue_may_hide_requests_until_it_was_seen_empty(watch: Watch):
    watch.server.running, watch.server.waiting = ["policy-v4"], 1
    assert await watch.passes(10 * QUIET_SECONDS)
    watch.server.waiting = 0
    assert await watch.passes(10)
    watch.server.waiting = 1
    assert await watch.passes(QUIET_SECONDS - 20), "what had waited may not have its first token yet"
    watch.server.running = ["policy-v3"]
    assert await watch.passes(DRAIN_SECONDS)
    watch.server.running = []
    assert not await watch.passes(QUIET_SECONDS + 10)


async def test_a_queue_that_is_never_empty_keeps_it_up_to_the_bound(watch: Watch):
    watch.server.running, watch.server.waiting = ["policy-v4"], 1
    assert await watch.passes(DRAIN_SECONDS - 10)
    assert not await watch.passes(20)


@pytest.mark.parametrize(
    "error", [Refused("not found", 404), Unreachable("broken", answered=True), TimeoutError()], ids=type
)
async def test_a_server_that_does_not_tell_keeps_it_up_to_the_bound(watch: Watch, error: Exception):
    watch.server.error = error
    assert await watch.passes(DRAIN_SECONDS - 10)
    assert not await watch.passes(20)


async def test_a_pause_keeps_it_and_what_was_seen_before_counts_no_more(watch: Watch):
    watch.server.running = []
    assert await watch.passes(QUIET_SECONDS + 10)
    assert await watch.passes(2 * DRAIN_SECONDS, paused=True)
    watch.server.waiting = 1
    assert await watch.passes(1)


async def test_one_that_was_loaded_again_and_left_again_begins_anew(watch: Watch):
    watch.server.running = []
    assert not await watch.passes(2 * QUIET_SECONDS + 10)
    watch.draining.follow([3])
    assert await watch.passes(QUIET_SECONDS)
    watch.draining.follow([])
    assert not watch.draining.kept | watch.draining.over


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "QUIET_SECONDS", SHORT_SECONDS)


@pytest.fixture
async def server() -> AsyncGenerator[FakeVllm]:
    async with FakeVllm() as server:
        yield server


Start = Callable[..., Follower]


@pytest.fixture
def start(server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path) -> Start:
    def start(*known: ResourceVersion, drain_seconds: float = 3_600.0) -> Follower:
        return Follower(
            server, session, *known, cache_folder=tmp_path / "cache", keep_versions=1, drain_seconds=drain_seconds
        )

    return start


def lora(folder: Path, number: int) -> ResourceVersion:
    return make_version(folder, number, kind="lora")


def cached(follower: Follower) -> list[int]:
    return [entry.version for entry in follower.shared.files.cache.entries()]


async def serve(follower: Follower, version: ResourceVersion) -> None:
    follower.versions.add(version)
    await follower.loop.step()
    assert follower.outcome[-1] == (version.version, True)


async def steps(follower: Follower, seconds: float) -> None:
    """So many seconds of comparisons."""
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        await follower.loop.step()


@pytest.mark.usefixtures("short")
async def test_files_stay_while_an_unloaded_adapter_runs_and_go_when_it_is_through(
    server: FakeVllm, start: Start, tmp_path: Path
):
    follower = start()
    server.running = {"policy-v1"}
    for number in (1, 2, 3):
        await serve(follower, lora(tmp_path, number))
    await steps(follower, 6 * SHORT_SECONDS)
    assert sorted(server.adapters) == ["policy-v3"]
    assert cached(follower) == [1, 3]
    server.running = {"policy-v3"}
    async with follower.running():
        await until(lambda: cached(follower) == [3])


async def test_files_of_adapters_that_left_a_moment_ago_stay(server: FakeVllm, start: Start, tmp_path: Path):
    """Requests that had asked for them may not have come to the engine."""
    follower = start()
    for number in (1, 2, 3):
        await serve(follower, lora(tmp_path, number))
    await follower.loop.step()
    assert cached(follower) == [1, 2, 3]
    await follower.shared.files.close()


@pytest.mark.usefixtures("short")
async def test_a_pause_that_the_follower_finds_begins_the_wait_anew(server: FakeVllm, start: Start, tmp_path: Path):
    follower = start()
    for number in (1, 2):
        await serve(follower, lora(tmp_path, number))
    await follower.loop.step()
    await asyncio.sleep(1.5 * SHORT_SECONDS)
    await follower.loop.step()
    server.paused = True
    await asyncio.sleep(1.5 * SHORT_SECONDS)
    await follower.loop.step()
    assert cached(follower) == [1, 2]
    async with follower.running():
        await until(lambda: cached(follower) == [2])


@pytest.mark.usefixtures("short")
async def test_a_follower_that_is_killed_meanwhile_leaves_the_claim_to_the_next_one(
    server: FakeVllm, start: Start, tmp_path: Path
):
    first = start()
    server.running = {"policy-v1"}
    for number in (1, 2):
        await serve(first, lora(tmp_path, number))
    first.shared.files.cache.close()  # as the kernel does when it ends
    second = start(lora(tmp_path, 2))
    await steps(second, 3 * SHORT_SECONDS)
    for number in (3, 4):
        await serve(second, lora(tmp_path, number))
    await steps(second, 6 * SHORT_SECONDS)
    assert cached(second) == [1, 4]
    server.running = set()
    async with second.running():
        await until(lambda: cached(second) == [4])


@pytest.mark.usefixtures("short")
async def test_a_follower_that_is_killed_after_the_unloading_leaves_the_claim_to_the_next_one(
    server: FakeVllm, start: Start, tmp_path: Path
):
    first = start()
    server.running = {"policy-v1"}
    await serve(first, lora(tmp_path, 1))
    first.shared.files.cache.close()
    server.adapters.clear()
    second = start()
    for number in (2, 3):
        await serve(second, lora(tmp_path, number))
    await steps(second, 6 * SHORT_SECONDS)
    assert cached(second) == [1, 3]
    await second.shared.files.close()


@pytest.mark.usefixtures("short")
async def test_files_stay_up_to_the_bound_where_the_server_does_not_tell(
    server: FakeVllm, start: Start, tmp_path: Path
):
    server.faults["/metrics"] = lambda: Response("Not Found", 404)
    follower = start(drain_seconds=1.0)
    for number in (1, 2):
        await serve(follower, lora(tmp_path, number))
    await steps(follower, 5 * SHORT_SECONDS)
    assert cached(follower) == [1, 2]
    async with follower.running():
        await until(lambda: cached(follower) == [2])


@pytest.mark.usefixtures("short")
async def test_one_server_of_two_that_still_runs_it_keeps_it(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    async with FakeVllm() as other:
        both = [server.url, other.url]
        shared = Shared(following(server, servers=both, cache_folder=tmp_path / "cache", keep_versions=1))
        one, two = (Follower(each, session, shared=shared) for each in (server, other))
        other.running = {"policy-v1"}
        for number in (1, 2):
            for follower in (one, two):
                await serve(follower, lora(tmp_path, number))
        for follower in (one, two, one):
            await steps(follower, 3 * SHORT_SECONDS)
        assert cached(one) == [1, 2]
        assert shared.files.cache.claimed(server.url) == {2}
        assert shared.files.cache.claimed(other.url) == {1, 2}
        await shared.files.close()

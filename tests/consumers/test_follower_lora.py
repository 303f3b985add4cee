"""Adapters against a fake vLLM: a model of its own for each version, nothing paused, old ones unloaded by the rule."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest
from starlette.responses import Response

from fulgurite.consumers.follower import draining
from fulgurite.consumers.follower.server import Refused
from fulgurite.consumers.follower.tries import LOAD_TRIES
from fulgurite.schemas.resources import ResourceVersion, adapter_name, adapter_version
from tests.consumers.follower_support import FakeVllm, Follower, make_version
from tests.producers.fake_policy_server import until


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def server() -> AsyncGenerator[FakeVllm]:
    async with FakeVllm() as server:
        yield server


def lora(folder: Path, number: int, weights: int | None = None) -> ResourceVersion:
    return make_version(folder, number, kind="lora", weights=weights)


def follower_of(server: FakeVllm, session: aiohttp.ClientSession, folder: Path, *known: ResourceVersion) -> Follower:
    return Follower(server, session, *known, cache_folder=folder / "cache", keep_versions=2, pinned_versions=[1])


@pytest.mark.parametrize(("resource", "version"), [("policy", 0), ("a-v2", 17), ("policy", 2**62)])
def test_an_adapters_name_says_which_version_it_is(resource: str, version: int):
    assert adapter_version(resource, adapter_name(resource, version)) == version


@pytest.mark.parametrize("model", ["policy", "policy-v", "policy-v01", "other-v1", "policy-v1-v2", "policy-v1x", "v1"])
def test_other_models_are_no_adapters_of_the_resource(model: str):
    assert adapter_version("policy", model) is None


async def test_adapters_are_loaded_beside_each_other_and_nothing_is_paused(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
    async with follower.running():
        await until(lambda: follower.outcome == [(2, True)])
        follower.versions.add(lora(tmp_path, 3))
        await until(lambda: follower.outcome == [(2, True), (3, True)])
    assert sorted(server.adapters) == ["policy-v2", "policy-v3"]
    assert not {"/pause", "/update_weight_version", "/collective_rpc"} & set(server.log)
    assert follower.events[0].seconds.keys() == {"verify", "load", "check", "unload", "total", "published"}


async def test_old_adapters_are_unloaded_but_never_pinned_ones(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(draining, "QUIET_SECONDS", 0.05)
    server.adapters = {"policy-v99x": "/somebody/elses", "other-v1": "/other"}
    follower = follower_of(server, session, tmp_path)
    async with follower.running():
        for number in range(1, 6):
            follower.versions.add(lora(tmp_path, number))
            await until(lambda number=number: (number, True) in follower.outcome)
        await until(lambda: len(follower.shared.files.cache.entries()) == 3)
    assert sorted(server.adapters) == ["other-v1", "policy-v1", "policy-v4", "policy-v5", "policy-v99x"]
    assert [entry.version for entry in follower.shared.files.cache.entries()] == [1, 4, 5]
    for version, path in ((4, server.adapters["policy-v4"]), (5, server.adapters["policy-v5"])):
        assert (Path(path) / "weights.txt").read_text() == str(version * 10)


async def test_adapters_of_a_log_that_was_begun_anew_give_way_to_its_first(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    """Whoever asks for the newest name would ask for theirs for ever."""
    server.adapters = {f"policy-v{number}": f"/old/v{number}" for number in (50, 51, 52)}
    follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
    await follower.loop.step()
    assert sorted(server.adapters) == ["policy-v2"]
    await follower.loop.step()
    await follower.shared.files.close()
    assert server.log.count("/v1/load_lora_adapter") == 1
    assert follower.outcome == [(2, True)]


async def test_the_files_of_a_loaded_adapter_outlive_the_trainers(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
    async with follower.running():
        await until(lambda: follower.outcome == [(2, True)])
    (tmp_path / "v2" / "weights.txt").unlink()
    assert (Path(server.adapters["policy-v2"]) / "weights.txt").read_text() == "20"


async def test_a_fresh_follower_sees_by_the_path_that_the_adapter_is_there(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    version = lora(tmp_path, 2)
    first = follower_of(server, session, tmp_path, version)
    await first.loop.step()
    await first.shared.files.close()
    again = follower_of(server, session, tmp_path, version)
    await again.loop.step()
    assert server.log.count("/v1/load_lora_adapter") == 1
    assert again.outcome == [(2, True)]


async def test_a_fresh_follower_replaces_an_adapter_that_has_other_files_than_were_announced(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = follower_of(server, session, tmp_path, lora(tmp_path / "one", 2))
    await follower.loop.step()
    await follower.shared.files.close()
    fresh = follower_of(server, session, tmp_path, lora(tmp_path / "other", 2, weights=21))
    await fresh.loop.step()
    assert (Path(server.adapters["policy-v2"]) / "weights.txt").read_text() == "21"
    assert fresh.outcome == [(2, True)]
    await fresh.shared.files.close()


async def test_a_restarted_server_gets_the_newest_adapter_again(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
    async with follower.running():
        await until(lambda: follower.outcome == [(2, True)])
        await server.restart()
        await until(lambda: "policy-v2" in server.adapters)
        await until(lambda: follower.outcome == [(2, True)] * 2)


@pytest.mark.parametrize("status", [400, 500])
async def test_an_adapter_the_server_cannot_load_is_refused_and_the_old_one_serves(
    server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path, status: int
):
    follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
    async with follower.running():
        await until(lambda: follower.outcome == [(2, True)])
        server.faults["/v1/load_lora_adapter"] = lambda: Response("rank 64 is greater than max_lora_rank", status)
        follower.versions.add(lora(tmp_path, 3))
        await until(lambda: follower.outcome == [(2, True), (3, False)])
        await asyncio.sleep(0.2)
    assert "max_lora_rank" in follower.events[1].error
    assert sorted(server.adapters) == ["policy-v2"]
    assert server.log.count("/v1/load_lora_adapter") == 1 + (1 if status == 400 else LOAD_TRIES)


async def test_a_server_started_without_adapters_is_told_how_and_gets_them_when_it_is_started_with(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with FakeVllm(routes=()) as server:
        follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
        with pytest.raises(Refused, match="--enable-lora"):
            await follower.loop.step()
        async with follower.running():
            await server.stop()
            server.routes = FakeVllm.routes
            await asyncio.sleep(0.1)
            await server.start()
            await until(lambda: follower.outcome == [(2, True)])


async def test_adapters_need_no_weight_routes(server: FakeVllm, session: aiohttp.ClientSession, tmp_path: Path):
    server.faults["/weight_info"] = lambda: Response("Not Found", 404)
    follower = follower_of(server, session, tmp_path, lora(tmp_path, 2))
    await follower.loop.step()
    assert follower.outcome == [(2, True)]
    await follower.shared.files.close()

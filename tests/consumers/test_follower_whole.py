"""No server is resumed on weights that are not known to be whole: loads that fail half way, against a fake that dies of
what vLLM dies of."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.consumers.follower.layout import Layout, read_layout
from fulgurite.consumers.follower.server import LABEL_LOADING, Unreachable
from fulgurite.consumers.follower.tries import LOAD_TRIES
from tests.consumers.follower_support import HALF_LOADED, Follower, FragileVllm, make_version, write_safetensors
from tests.producers.fake_policy_server import FakePolicyServer, until


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def server() -> AsyncGenerator[FragileVllm]:
    async with FragileVllm() as server:
        yield server
        assert not server.died, "it was resumed on half-loaded weights"


def serves(server: FakePolicyServer, version: int) -> bool:
    return (server.label, server.weights, server.paused) == (str(version), version * 10, False)


def is_held(server: FakePolicyServer) -> bool:
    return server.paused and (server.label or "").startswith(LABEL_LOADING)


async def test_a_load_that_fails_is_undone_before_the_server_goes_on(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, make_version(tmp_path, 3))
    async with follower.running():
        await until(lambda: serves(server, 3))
        server.log.clear()
        server.unreadable.add("v4")
        follower.versions.add(make_version(tmp_path, 4))
        await until(lambda: follower.outcome == [(3, True), (4, False), (3, True)])
        assert serves(server, 3)
        swap = [path for path in server.log if path in ("/pause", "/collective_rpc", "/resume")]
        assert swap == ["/pause", "/collective_rpc", "/collective_rpc", "/resume"] * LOAD_TRIES
    assert "collective_rpc" in follower.events[1].error


async def test_files_that_change_while_they_are_loaded_are_undone_before_the_server_goes_on(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    """The server reads what the checksum did not see."""
    follower = Follower(server, session, make_version(tmp_path, 3))
    async with follower.running():
        await until(lambda: serves(server, 3))
        server.log.clear()
        server.before_load = lambda: (tmp_path / "v4" / "weights.txt").write_text("666")
        follower.versions.add(make_version(tmp_path, 4))
        await until(lambda: follower.outcome == [(3, True), (4, False), (3, True)])
        assert serves(server, 3)
        swap = [path for path in server.log if path in ("/pause", "/collective_rpc", "/resume")]
        assert swap == ["/pause", "/collective_rpc", "/collective_rpc", "/resume"]
    assert "checksum" in follower.events[1].error


async def test_files_that_were_only_touched_are_the_same(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    server.before_load = (tmp_path / "v3" / "weights.txt").touch
    follower = Follower(server, session, make_version(tmp_path, 3))
    await follower.loop.step()
    assert serves(server, 3)
    assert follower.outcome == [(3, True)]


async def test_weights_that_hash_to_something_else_are_undone_before_the_server_goes_on(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    for number in (3, 4):
        write_safetensors(tmp_path / f"v{number}" / "model.safetensors", {"w": (4,)}, fill=number)
    follower = Follower(server, session, make_version(tmp_path, 3))
    resumed_with: list[int] = []
    server.faults["/resume"] = lambda: resumed_with.append(server.weights)
    async with follower.running():
        await until(lambda: serves(server, 3))
        (tmp_path / "v4").mkdir(exist_ok=True)
        bad = make_version(tmp_path, 4, weights=30)  # loads what 3 is, so the hash stays
        follower.versions.add(bad)
        await until(lambda: (4, False) in follower.outcome)
    assert set(resumed_with) == {30}
    assert serves(server, 3)


async def test_what_a_fresh_follower_cannot_undo_with_the_last_version_it_undoes_with_another(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "3", 30
    server.unreadable.add("v4")
    gone = make_version(tmp_path, 3)
    follower = Follower(server, session, make_version(tmp_path, 2), gone, make_version(tmp_path, 4))
    shutil.rmtree(tmp_path / "v3")
    async with follower.running():
        await until(lambda: (4, False) in follower.outcome)
        await until(lambda: serves(server, 2))


async def test_a_server_without_anything_whole_stays_paused_until_a_version_can_be_loaded(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    server.label, server.weights = "3", 30
    server.unreadable.add("v4")
    follower = Follower(server, session, make_version(tmp_path, 4))
    metrics = follower.shared.metrics
    async with follower.running():
        await until(lambda: follower.outcome == [(4, False)])
        tries = server.log.count("/collective_rpc")
        await until(lambda: server.log.count("/collective_rpc") >= tries + 2)  # refused, and tried all the same
        assert is_held(server)
        assert server.weights == HALF_LOADED
        assert follower.outcome == [(4, False)], "it is said once"
        assert "kept paused" in metrics.not_ready()[server.url]
        assert metrics.registry.get_sample_value("fulgurite_follower_held", {"server": server.url}) == 1
        server.unreadable.clear()
        await until(lambda: serves(server, 4))
        await until(lambda: follower.outcome == [(4, False), (4, True)])
        assert not metrics.not_ready()
    assert "STAYS PAUSED" in caplog.text


class Dying(FragileVllm):
    """Does not outlive the load of some folders, and is started again with a model of its own."""

    deadly = frozenset({"v4"})
    starts = 0

    async def _collective_rpc(self, request: Request) -> Response:
        if Path((await request.json())["kwargs"]["weights_path"]).name not in self.deadly:
            return await super()._collective_rpc(request)
        self.starts += 1
        assert self._server
        for listener in self._server.servers:
            listener.close()  # at once: nobody asks one that is dead
        self.starting = asyncio.create_task(self.restart(weights=10))
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("rollout_policy", ["rolling", "together"])
async def test_a_version_that_takes_the_server_down_is_refused_and_the_one_before_serves(
    session: aiohttp.ClientSession, tmp_path: Path, caplog: pytest.LogCaptureFixture, rollout_policy: str
):
    async with Dying() as server:
        follower = Follower(server, session, make_version(tmp_path, 3), rollout_policy=rollout_policy)
        async with follower.running():
            await until(lambda: serves(server, 3))
            follower.versions.add(make_version(tmp_path, 4))
            await until(lambda: follower.outcome == [(3, True), (4, False), (3, True)])
            assert serves(server, 3)
    assert server.starts == LOAD_TRIES
    assert "REFUSED policy version 4" in caplog.text


class DyingLater(FragileVllm):
    """Takes the version, and does not outlive what comes next."""

    when = ""
    starts = 0
    last = ""
    """Folder that was loaded last."""

    async def _collective_rpc(self, request: Request) -> Response:
        self.last = Path((await request.json())["kwargs"]["weights_path"]).name
        return await super()._collective_rpc(request)

    async def _update_weight_version(self, request: Request) -> Response:
        await self._die_at("label")
        return await super()._update_weight_version(request)

    async def _resume(self, request: Request) -> Response:
        await self._die_at("resume")
        answer = await super()._resume(request)
        if self.when == "first request" and self.last == "v4":
            self.starting = asyncio.create_task(self._start_anew(0.02))
        return answer

    async def _die_at(self, when: str) -> None:
        if self.when == when and self.last == "v4":
            assert self._server
            for listener in self._server.servers:
                listener.close()
            self.starting = asyncio.create_task(self._start_anew(0))
            await asyncio.Event().wait()

    async def _start_anew(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.last = ""
        self.starts += 1
        await self.restart(weights=10)


@pytest.mark.parametrize("when", ["label", "resume", "first request"])
async def test_a_version_that_takes_the_server_down_after_its_load_is_refused(
    session: aiohttp.ClientSession, tmp_path: Path, when: str
):
    async with DyingLater() as server:
        server.when = when
        follower = Follower(server, session, make_version(tmp_path, 3))
        async with follower.running():
            await until(lambda: serves(server, 3))
            follower.versions.add(make_version(tmp_path, 4))
            await until(lambda: (4, False) in follower.outcome)
            await until(lambda: serves(server, 3))
    assert server.starts == LOAD_TRIES


async def test_a_restart_by_a_person_refuses_nothing(session: aiohttp.ClientSession, tmp_path: Path):
    """Nor does it after loads that had failed."""
    async with FragileVllm() as server:
        follower = Follower(server, session, make_version(tmp_path, 3))
        async with follower.running():
            await until(lambda: serves(server, 3))
            server.unreadable.add("v4")
            follower.versions.add(make_version(tmp_path, 4))
            await until(lambda: server.log.count("/collective_rpc") >= 1 + 2 * (LOAD_TRIES - 1))
            server.unreadable.clear()
            await until(lambda: serves(server, 4))
            for _ in range(LOAD_TRIES - 1):
                await server.restart(weights=10)
                await until(lambda: serves(server, 4))
        assert (4, False) not in follower.outcome


async def test_a_load_that_is_never_answered_refuses_the_version_in_the_end(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, make_version(tmp_path, 3), request_seconds=0.2)
    async with follower.running():
        await until(lambda: serves(server, 3))
        server.before_load = lambda: setattr(server, "hold", ("/collective_rpc", 1))
        follower.versions.add(make_version(tmp_path, 4))
        await until(lambda: (4, False) in follower.outcome)
        server.before_load = None
        await until(lambda: serves(server, 3))


async def test_a_newer_version_ends_the_wait(server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path):
    server.unreadable.add("v4")
    follower = Follower(server, session, make_version(tmp_path, 4))
    async with follower.running():
        await until(lambda: server.weights == HALF_LOADED)
        follower.versions.add(make_version(tmp_path, 5))
        await until(lambda: serves(server, 5))


async def test_a_restart_of_the_server_ends_the_wait(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "3", 30
    server.unreadable.add("v4")
    follower = Follower(server, session, make_version(tmp_path, 4, weights=50))
    async with follower.running():
        await until(lambda: is_held(server))
        server.unreadable.clear()
        await server.restart(weights=10)
        await until(lambda: server.label == "4" and server.weights == 50 and not server.paused)


async def test_a_fresh_follower_that_knows_no_version_leaves_a_half_loaded_server_paused(
    session: aiohttp.ClientSession,
):
    async with FragileVllm(label=LABEL_LOADING, weights=HALF_LOADED, paused=True) as server:
        with pytest.raises(Unreachable, match="no version is known"):
            await Follower(server, session).loop.step()
        assert server.paused


async def test_a_server_that_gets_adapters_is_given_whole_weights_first(session: aiohttp.ClientSession, tmp_path: Path):
    async with FragileVllm(label=LABEL_LOADING, weights=HALF_LOADED, paused=True) as server:
        known = [make_version(tmp_path, 3), make_version(tmp_path, 4, kind="lora")]
        follower = Follower(server, session, *known, cache_folder=tmp_path / "cache")
        async with follower.running():
            await until(lambda: serves(server, 3) and "policy-v4" in server.adapters)
            await until(lambda: follower.outcome == [(3, True), (4, True)])
        assert not server.died


async def test_a_stop_waits_for_a_load_under_way(server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path):
    server.load_seconds = 0.3
    async with Follower(server, session, make_version(tmp_path, 3)).running():
        await until(lambda: "/collective_rpc" in server.log)
        assert server.paused
    assert serves(server, 3)


async def test_a_load_that_never_answers_leaves_the_server_paused_and_the_next_start_repairs_it(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    server.label, server.weights = "3", 30
    server.hold = ("/collective_rpc", 1)
    version = make_version(tmp_path, 4)
    async with Follower(server, session, version, request_seconds=0.3).running():
        await server.held.wait()
    assert is_held(server)
    async with Follower(server, session, version).running():
        await until(lambda: serves(server, 4))


async def test_a_half_loaded_server_that_does_not_answer_keeps_nobody_waiting(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session, make_version(tmp_path, 3), request_seconds=0.3)
    async with FragileVllm() as other:
        twin = Follower(other, session, shared=follower.shared)
        server.hold = ("/collective_rpc", 1)
        async with follower.running():
            await server.held.wait()
            async with twin.running():
                await until(lambda: serves(other, 3), seconds=5)
                await until(lambda: serves(server, 3), seconds=5)


async def test_files_that_no_server_could_load_whole_are_refused_before_anything_is_paused(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path
):
    follower = Follower(server, session)
    for number, shapes in enumerate(({"a": (2, 2), "b": (4,)}, {"a": (2, 2)}, {"a": (2, 2), "b": (4,), "c": (1,)}), 1):
        write_safetensors(tmp_path / f"v{number}" / "model.safetensors", shapes)
    cut = write_safetensors(tmp_path / "v4" / "model.safetensors", {"a": (2, 2), "b": (4,)})
    cut.write_bytes(cut.read_bytes()[:-1])
    async with follower.running():
        for number in range(1, 5):
            follower.versions.add(make_version(tmp_path, number))
            await until(lambda number=number: (number, number == 1) in follower.outcome)
    assert serves(server, 1)
    assert server.log.count("/pause") == 1
    assert "b are missing" in follower.events[1].error
    assert "c are new" in follower.events[2].error
    assert "cut off" in follower.events[3].error


@pytest.mark.parametrize("when", ["before its headers are read", "after them"])
async def test_a_folder_that_goes_before_it_is_loaded_is_refused_and_the_follower_goes_on(
    server: FragileVllm, session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    """Its trainer prunes while a follower that is behind verifies it."""

    def pruned(folder: Path) -> Layout:
        if folder.name != "v2":
            return read_layout(folder)
        layout = read_layout(folder) if when == "after them" else None
        shutil.rmtree(folder)
        return layout if layout is not None else read_layout(folder)

    monkeypatch.setattr("fulgurite.consumers.follower.converge.read_layout", pruned)
    follower = Follower(server, session)
    for number in (1, 3):
        write_safetensors(tmp_path / f"v{number}" / "model.safetensors", {"a": (2, 2)})
    async with follower.running():
        for number in (1, 2, 3):
            follower.versions.add(make_version(tmp_path, number))
            await until(lambda number=number: (number, number != 2) in follower.outcome)
    assert serves(server, 3)
    assert server.log.count("/pause") == 2
    assert "No such file" in follower.events[1].error


@pytest.mark.parametrize(("config", "warnings"), [("device_config=cpu, ", 1), ("device_config=cuda, ", 0), (None, 0)])
async def test_tied_embeddings_on_a_cpu_are_warned_of_once(
    session: aiohttp.ClientSession,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    config: str | None,
    warnings: int,
):
    async def info(_: Request) -> Response:
        return JSONResponse({"vllm_config": f"model=m, {config}x"}, 200 if config else 404)

    class Described(FragileVllm):
        def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
            return [*super().more_routes(), ("/server_info", "GET", info)]

    async with Described() as server:
        follower = Follower(server, session)
        for number in (1, 2):
            (tmp_path / f"v{number}").mkdir()
            (tmp_path / f"v{number}" / "config.json").write_text('{"tie_word_embeddings": true}')
            follower.versions.add(make_version(tmp_path, number))
            await follower.loop.step()
        assert follower.outcome == [(1, True), (2, True)]
        assert server.log.count("/server_info") == 1
    assert sum("tied" in record.message for record in caplog.records) == warnings

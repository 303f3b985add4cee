"""Weights sent to a fake vLLM instead of read by it: one group for many versions, files where there are no routes, and
nothing half sent that is served."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any, cast

import aiohttp
import psutil
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fulgurite.consumers.follower import sender as sender_module
from fulgurite.consumers.follower.server import Unreachable
from fulgurite.consumers.follower.transfer import Transfer
from fulgurite.consumers.follower.tries import LOAD_TRIES
from fulgurite.schemas.resources import ResourceVersion
from tests.consumers.follower_support import FakeVllm, Follower, make_version, write_safetensors
from tests.producers.fake_policy_server import until

pytestmark = pytest.mark.timeout(120)

FAKE_VLLM = Path(__file__).with_name("fake_vllm")
SHAPES = {"model.embed.weight": (2, 3), "lm_head.weight": (4,)}
SECONDS = 60.0
"""A sender starts as long as torch does."""


@dataclass
class TransferringVllm(FakeVllm):
    """With the routes of weight transfer. Its weights are the sum of what was sent."""

    groups: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What it was told of each group it joined."""
    configured: bool = True
    updating: bool = False
    told: list[Any] = field(default_factory=list[Any])
    update_seconds: float = 0.0

    def more_routes(self) -> list[tuple[str, str, Any]]:
        return [
            *super().more_routes(),
            ("/get_world_size", "GET", self._world_size),
            ("/init_weight_transfer_engine", "POST", self._init),
            ("/shutdown_weight_transfer_engine", "POST", self._shutdown),
            ("/start_weight_update", "POST", self._start),
            ("/update_weights", "POST", self._update),
            ("/finish_weight_update", "POST", self._finish),
        ]

    async def restart(self, *, label: str | None = "default", weights: int = 0) -> None:
        await super().restart(label=label, weights=weights)
        self.updating = False

    async def _world_size(self, request: Request) -> Response:
        return JSONResponse({"world_size": 2})

    async def _init(self, request: Request) -> Response:
        if not self.configured:
            return PlainTextResponse("Weight transfer not configured.", 500)
        self.groups.append((await request.json())["init_info"])
        return JSONResponse({})

    async def _shutdown(self, request: Request) -> Response:
        return PlainTextResponse("during a weight update", 500) if self.updating else JSONResponse({})

    async def _start(self, request: Request) -> Response:
        if self.updating:
            return PlainTextResponse("already active", 500)
        self.updating = True
        return JSONResponse({})

    async def _update(self, request: Request) -> Response:
        info = (await request.json())["update_info"]
        if not info:  # what no update is: as vLLM, it fails, and the update is over
            self.updating = False
            return PlainTextResponse("Invalid update_info", 500)
        assert self.paused
        await asyncio.sleep(self.update_seconds)
        self.told = info["told"]
        self.weights = sum(number for _, number in info["sent"])
        return JSONResponse({})

    async def _finish(self, request: Request) -> Response:
        self.updating = False
        return JSONResponse({})


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_VLLM))


def version(folder: Path, number: int) -> ResourceVersion:
    """Ten bytes of tensors, each the version's number."""
    write_safetensors(folder / f"v{number}" / "model.safetensors", SHAPES, fill=number)
    return make_version(folder, number)


def follower_of(server: FakeVllm, session: aiohttp.ClientSession, *known: ResourceVersion, **more: Any) -> Follower:
    settings: dict[str, Any] = {
        "load": "transfer",
        "transfer_device": "cpu",
        "request_seconds": 20.0,
        "check_weights": False,
    }
    return Follower(server, session, *known, **(settings | more))


def senders() -> list[psutil.Process]:
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if any("sender.py" in part for part in child.cmdline())]


async def test_versions_are_sent_by_one_group_and_a_new_one_when_the_server_or_the_sender_is_another(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with TransferringVllm() as server:
        follower = follower_of(server, session, version(tmp_path, 1))
        async with follower.running():
            await until(lambda: follower.outcome == [(1, True)], SECONDS)
            assert server.weights == 10
            assert server.told == [
                ["lm_head.weight", "torch.uint8", [4]],
                ["model.embed.weight", "torch.uint8", [2, 3]],
            ] or server.told == [["model.embed.weight", "torch.uint8", [2, 3]], ["lm_head.weight", "torch.uint8", [4]]]
            follower.versions.add(version(tmp_path, 2))
            await until(lambda: follower.outcome[1:] == [(2, True)])
            assert server.weights == 20
            (group,) = server.groups
            assert (group["world_size"], group["rank"], group["master_address"]) == (3, 0, "127.0.0.1")

            await server.restart()
            await until(lambda: follower.outcome[2:] == [(2, True)], SECONDS)
            assert (server.weights, len(server.groups)) == (20, 2)

            (sender,) = senders()
            sender.send_signal(signal.SIGKILL)
            follower.versions.add(version(tmp_path, 3))
            await until(lambda: follower.outcome[3:] == [(3, True)], SECONDS)
            assert (server.weights, len(server.groups)) == (30, 3)
            assert not server.paused
        assert "/collective_rpc" not in server.log
        assert not senders()


@pytest.mark.parametrize("missing", ["routes", "configuration"])
async def test_a_server_without_weight_transfer_is_given_files(
    session: aiohttp.ClientSession, tmp_path: Path, missing: str, caplog: pytest.LogCaptureFixture
):
    server = FakeVllm() if missing == "routes" else TransferringVllm(configured=False)
    async with server:
        follower = follower_of(server, session, version(tmp_path, 1))
        async with follower.running():
            await until(lambda: follower.outcome == [(1, True)], SECONDS)
            follower.versions.add(version(tmp_path, 2))
            await until(lambda: follower.outcome[1:] == [(2, True)])
        assert server.log.count("/collective_rpc") == 2
        assert server.log.count("/get_world_size") == (1 if missing == "configuration" else 0)
    assert caplog.text.count("--weight-transfer-config") == 1


async def test_what_was_half_sent_is_never_served(session: aiohttp.ClientSession, tmp_path: Path):
    async with TransferringVllm() as server:
        follower = follower_of(server, session, version(tmp_path, 1))
        async with follower.running():
            await until(lambda: follower.outcome == [(1, True)], SECONDS)
            fails = iter(range(2 * LOAD_TRIES))

            def fault() -> Response | None:
                # The version, then what is given back in its place: only that succeeds.
                if next(fails) % 2:
                    return None
                server.weights, server.updating = -1, False
                return PlainTextResponse("the worker died", 500)

            server.faults["/update_weights"] = fault
            follower.versions.add(version(tmp_path, 2))
            await until(lambda: (2, False) in follower.outcome, SECONDS)
            refused = follower.events[follower.outcome.index((2, False))]
            assert "the worker died" in refused.error
            await until(lambda: not server.paused)
            assert (server.weights, server.label) == (10, "1")
            assert (2, True) not in follower.outcome
            # An update of nothing after each that failed: vLLM would count what it has of it.
            started = [path for path in server.log if path in ("/start_weight_update", "/update_weights")]
            assert started.count("/start_weight_update") == started.count("/update_weights") + LOAD_TRIES


async def test_files_that_cannot_be_sent_are_refused_and_nothing_was_touched(
    session: aiohttp.ClientSession, tmp_path: Path
):
    async with TransferringVllm() as server:
        follower = follower_of(server, session, version(tmp_path, 1))
        async with follower.running():
            await until(lambda: follower.outcome == [(1, True)], SECONDS)
            write_safetensors(tmp_path / "v2" / "model.safetensors", SHAPES, fill=2, dtype="F33")
            follower.versions.add(make_version(tmp_path, 2))
            await until(lambda: follower.outcome[1:] == [(2, False)], SECONDS)
            await until(lambda: not server.paused)
        assert server.log.count("/start_weight_update") == 1
        assert (server.weights, server.label) == (10, "1")


async def test_a_stop_lets_the_sender_finish_what_workers_wait_for(session: aiohttp.ClientSession, tmp_path: Path):
    async with TransferringVllm() as server:
        transfer = Transfer(server.url, follower_of(server, session).shared.settings)
        await transfer.connect()
        (sender,) = senders()
        folder = tmp_path / "v1"
        write_safetensors(folder / "model.safetensors", SHAPES, fill=1)
        server.paused, server.update_seconds = True, 1.0
        sending = asyncio.create_task(transfer.send(folder))
        await until(lambda: server.updating)
        sender.send_signal(signal.SIGTERM)  # as to all of a group
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await transfer.close()
        assert server.weights == 0
        await until(lambda: server.weights == 10 and not server.updating)
        await until(lambda: not senders())


async def test_a_sender_that_ended_is_left_and_another_started(session: aiohttp.ClientSession, tmp_path: Path):
    """Also one that ended while nobody talked to it: nothing of it stays open."""
    async with TransferringVllm() as server:
        transfer = Transfer(server.url, follower_of(server, session).shared.settings)
        await transfer.connect()
        (sender,) = senders()
        sender.send_signal(signal.SIGKILL)
        await until(lambda: not transfer.connected)
        await transfer.connect()
        gc.collect()
        assert transfer.connected
        assert len(senders()) == 1
        await transfer.close()
        assert not senders()


async def test_a_start_that_nobody_waits_for_any_more_leaves_no_process(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
):
    def slow(*arguments: Any, **more: Any) -> Popen[bytes]:
        time.sleep(0.3)
        return cast(Popen[bytes], Popen(*arguments, **more))

    monkeypatch.setattr("fulgurite.consumers.follower.transfer.Popen", slow)
    async with TransferringVllm() as server:
        transfer = Transfer(server.url, follower_of(server, session).shared.settings)
        connecting = asyncio.create_task(transfer.connect())
        await asyncio.sleep(0.1)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        await transfer.close()
        await asyncio.sleep(0.5)
        gc.collect()
        await until(lambda: not senders())


async def test_a_sender_ends_with_whoever_started_it_and_asks_no_proxy(tmp_path: Path):
    async with TransferringVllm() as server:
        env = os.environ | {"http_proxy": "http://127.0.0.1:1", sender_module.API_KEY: ""}
        command = [sys.executable, "-P", sender_module.__file__, server.url, "--host=127.0.0.1", "--device=cpu"]
        sender = await asyncio.create_subprocess_exec(
            *command, "--seconds=2", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=env
        )
        assert sender.stdin
        assert sender.stdout
        assert json.loads(await asyncio.wait_for(sender.stdout.readline(), SECONDS)) == {"ready": True}
        server.update_seconds, server.paused = 30.0, True
        folder = tmp_path / "v1"
        write_safetensors(folder / "model.safetensors", SHAPES)
        sender.stdin.write(json.dumps({"folder": str(folder)}).encode() + b"\n")
        await until(lambda: server.updating)
        sender.stdin.close()
        sender._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined] # nobody hears it either
        assert await asyncio.wait_for(sender.wait(), 20) == 1


async def test_a_sender_that_cannot_start_pauses_nothing(session: aiohttp.ClientSession, tmp_path: Path):
    async with TransferringVllm() as server:
        here = tmp_path / "nowhere" / "python"
        follower = follower_of(server, session, version(tmp_path, 1), transfer_python=str(here))
        with pytest.raises(Unreachable, match="transfer_python"):
            await follower.loop.step()
        os.environ["PYTHONPATH"] = ""  # an interpreter without vLLM
        follower = follower_of(server, session, version(tmp_path, 1))
        with pytest.raises(Unreachable, match="vllm"):
            await follower.loop.step()
        assert "/pause" not in server.log
        assert server.label == "default"

"""Real processes told to log JSON: every line they write to stderr is an object, from the first one to the last."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from fulgurite.infra.ports import free_port
from fulgurite.infra.stores import hold_folder
from fulgurite.schemas import topics
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import ENV_PREFIX, Settings
from tests.infra.dlq_world import World, span

JSON = {f"{ENV_PREFIX}LOG__FORMAT": "json"}


async def start(world: World, *arguments: str, **more: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fulgurite.infra", *arguments),
        env={**world.environment, **JSON, **more},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(child: asyncio.subprocess.Process) -> tuple[int | None, list[dict[str, Any]]]:
    """Its exit code and its log; nothing else may have been written."""
    out, text = await asyncio.wait_for(child.communicate(), 60)
    assert out == b""
    return child.returncode, [json.loads(line) for line in text.decode().splitlines()]


async def answers(url: str, status: int) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(600):
            try:
                if (await client.get(url)).status_code == status:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise AssertionError(f"{url} never said {status}")


async def test_a_materialiser_and_the_libraries_in_it(settings: Settings, tmp_path: Path) -> None:
    world, port = World(settings, tmp_path), free_port()
    child = await start(world, "materialiser", "--set", f"materialiser.port={port}", "--set", "log.level=debug")
    await world.produce(topics.SPANS, [span()], partition=1)
    await answers(f"http://127.0.0.1:{port}/ready", 200)
    await world.until("SELECT count() FROM spans", lambda rows: rows == [(1,)])
    child.terminate()
    code, lines = await ended(child)
    assert code == 0
    assert {line["service"] for line in lines} == {"materialiser"}
    loggers = {line["logger"] for line in lines}
    assert {"uvicorn.error", "asyncio", "fulgurite.producers.service"} <= loggers
    assert lines[-1]["message"] == "materialiser stopped"
    [resumed] = [line for line in lines if line.get("topic") == world.name(topics.SPANS) and line["partition"] == 1]
    assert resumed["offset"] in (0, 1)
    assert resumed["message"].startswith(f"{world.name(topics.SPANS)}-1: goes on at offset {resumed['offset']}")


async def test_a_broker_that_is_away_and_a_stop_meanwhile(tmp_path: Path) -> None:
    world = World(Settings(), tmp_path)
    child = await start(world, "gateway", "--set", f"kafka.bootstrap_servers=127.0.0.1:{free_port()}")
    assert child.stderr is not None
    first: list[dict[str, Any]] = []
    while not first or not first[-1]["message"].endswith("trying again"):
        first.append(json.loads(await asyncio.wait_for(child.stderr.readline(), 60)))
    child.terminate()
    code, rest = await ended(child)
    assert code == 0
    warnings = [line["message"] for line in first if line["level"] == "WARNING"]
    assert warnings
    assert all("does not answer" in message for message in warnings)
    assert any("listening on" in line["message"] for line in first), "calls wait for the broker, connections do not"
    assert rest[-1]["message"] == "gateway stopped"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gateway", "--set", "gateway.prt=1"], SettingsError.exit_code, "--set gateway.prt: no such setting"),
        (["up", "--foreground"], StartError.exit_code, "fulgurite demo"),
        pytest.param(
            ["policy-server", "--set", "policy_server.port={taken}"],
            StartError.exit_code,
            "cannot listen on 127.0.0.1:",
            marks=pytest.mark.slow,  # it imports torch
        ),
    ],
)
async def test_what_ends_a_command_is_one_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    world = World(Settings(), tmp_path)
    with contextlib.closing(hold_folder(tmp_path, "fulgurite demo")), socket.create_server(("127.0.0.1", 0)) as taken:
        given = [argument.format(taken=taken.getsockname()[1]) for argument in arguments]
        found, lines = await ended(await start(world, *given))
    assert found == code
    assert lines[-1]["level"] == "ERROR"
    assert message in lines[-1]["message"]

"""One vLLM for the session: it takes a minute to start and 4 GB. Every test has its own topics, gateway, follower."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fulgurite.infra.vllm import ENVIRONMENT
from fulgurite.schemas.settings import KafkaSettings
from tests.vllm.server import PLUGIN, ROOT, VllmServer
from tests.vllm.tiny_model import Oracle, make_model
from tests.vllm.world import World, running


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Version -> folder."""
    folder = tmp_path_factory.mktemp("models")
    return {number: make_model(folder / f"v{number}", seed=number) for number in (1, 2, 3)}


@pytest.fixture(scope="session")
def oracles(models: dict[int, Path]) -> dict[int, Oracle]:
    return {number: Oracle(folder) for number, folder in models.items()}


@pytest.fixture(scope="session")
def vllm(models: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with VllmServer(models[3], tmp_path_factory.mktemp("vllm") / "vllm.log") as server:
        yield server


@pytest.fixture
async def world(
    request: pytest.FixtureRequest,
    kafka_settings: KafkaSettings,
    vllm: VllmServer,
    models: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncGenerator[World]:
    """Version 1 is served. With the parameter "transfer" weights are sent, and not read by vLLM; with "one adapter" the
    follower unloads all but the newest."""
    following: dict[str, Any] = {}
    if getattr(request, "param", "files") == "one adapter":
        following = {"keep_versions": 1}
    if getattr(request, "param", "files") == "transfer":
        monkeypatch.setenv("PYTHONPATH", PLUGIN)
        python = ROOT / ENVIRONMENT / "bin" / "python"
        # Hashes would find what went wrong, and it would be done again: here it must be right at once.
        following = {"load": "transfer", "transfer_python": str(python), "check_weights": False}
        following |= {"transfer_device": "cpu"}
    async with running(kafka_settings, vllm, tmp_path, **following) as world:
        await world.serve(1, models[1])
        yield world
    await vllm.unload_adapters()

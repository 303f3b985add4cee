"""One vLLM for the session: it takes a minute to start and 4 GB. Every test has its own topics, gateway, follower."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from fulgurite.schemas.settings import KafkaSettings
from tests.vllm.server import VllmServer
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
    kafka_settings: KafkaSettings, vllm: VllmServer, models: dict[int, Path], tmp_path: Path
) -> AsyncGenerator[World]:
    """Version 1 is served."""
    async with running(kafka_settings, vllm, tmp_path) as world:
        await world.serve(1, models[1])
        yield world
    await vllm.unload_adapters()

"""What `fulgurite tail` and `fulgurite trace` print of what is legal and rare."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulgurite.schemas import topics
from fulgurite.schemas.settings import Settings
from tests.infra.dlq_world import World, span


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> World:
    return World(settings, tmp_path)


async def test_a_header_without_a_value_is_shown(world: World) -> None:
    await world.produce(topics.SPANS, [span()], headers=[("traceparent", None), ("tenant", b"\xff1")])
    done = await world.cli("tail", "spans", "-n", "1")
    assert (done.code, done.out.strip().endswith("traceparent=null tenant=\ufffd1")) == (0, True), done
    assert (await world.cli("tail", "spans", "-n", "1", "--full")).code == 0

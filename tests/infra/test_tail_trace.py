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


async def test_a_rollout_that_is_cut_says_so(world: World) -> None:
    world.ask(
        "INSERT INTO spans (rollout_id, attempt_id, span_id, name, start_ns, end_ns, _offset, _index) "
        "SELECT 'big', 'a', toString(number), 'n', number + 1, number + 2, intDiv(number, 2), number % 2 "
        "FROM numbers(3000) ORDER BY number"
    )
    world.ask(
        "INSERT INTO spans (rollout_id, attempt_id, span_id, name) SELECT 'full', 'a', number, 'n' FROM numbers(1000)"
    )
    world.ask(
        "INSERT INTO rewards (rollout_id, attempt_id, reward_id, name, value, time_ns) "
        "SELECT 'big', 'a', intDiv(number, 2), 'reward', number, number FROM numbers(300)"
    )
    done = await world.cli("trace", "big")
    assert done.out.count("reward = ") == 100
    told = " ".join(done.out.split())  # lines are as long as the terminal is wide
    assert "… 2,000 more spans and 50 more rewards, later ones: ask for them with fulgurite sql" in told
    assert "more" not in (await world.cli("trace", "full")).out

"""vLLM is killed under load and comes back: agents only wait, and every answer they got is on the log once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.vllm.tiny_model import Oracle, worst_error
from tests.vllm.world import TOLERANCE, World, until

pytestmark = [pytest.mark.vllm, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

AGENTS = 6


async def test_a_kill_under_load_loses_nothing(world: World, models: dict[int, Path], oracles: dict[int, Oracle]):
    await world.serve(2, models[2])
    answered: list[str] = []
    enough = asyncio.Event()

    async def agent(number: int) -> None:
        async with world.agent(f"r{number}", max_retries=0) as client:
            while not enough.is_set():
                answer = await client.chat.completions.create(
                    model="policy", messages=[{"role": "user", "content": f"{number}"}], max_tokens=60
                )
                answered.append(answer.id)

    async def serves_2() -> bool:
        return await world.vllm.label() == "2"

    agents = [asyncio.create_task(agent(number)) for number in range(AGENTS)]
    await until(more_than(answered, 20), "no answers")
    await asyncio.to_thread(world.vllm.kill)
    before = len(answered)
    await asyncio.sleep(1)
    assert len(answered) <= before + AGENTS  # nobody answers, and nobody is told so
    assert not any(one.done() for one in agents)
    world.vllm.start()
    await asyncio.to_thread(world.vllm.wait_ready)
    await until(serves_2, "the follower did not bring it back to version 2")
    await until(more_than(answered, len(answered) + 20), "no answers after the restart")
    enough.set()
    await asyncio.gather(*agents)  # none saw an error

    spans = await world.spans()
    recorded = [span.attributes["gen_ai.response.id"] for span in spans if span.status == "ok"]
    assert sorted(recorded) == sorted(answered)
    assert await world.dead_letters() == 0
    last = max(spans, key=lambda span: span.start_ns)
    assert [part.version for part in last.weight_versions] == [2]
    tokens = (last.prompt_token_ids, last.response_token_ids, last.logprobs)
    assert worst_error(oracles, *tokens, last.weight_versions) < TOLERANCE


def more_than(answers: list[str], count: int) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return len(answers) > count

    return check

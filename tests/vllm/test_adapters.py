"""LoRA: the follower loads each version as a model of its own beside those before it, also while requests run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.resources import adapter_name
from tests.vllm.tiny_model import Oracle, make_adapter, worst_error
from tests.vllm.world import TOLERANCE, World, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
TOKENS = 300


async def test_each_version_is_an_adapter_and_a_request_keeps_the_one_it_began_with(
    world: World, models: dict[int, Path], tmp_path: Path
):
    adapters = {number: make_adapter(tmp_path / f"adapter{number}", number) for number in (2, 3)}

    async def ask(rollout: str, model: str) -> None:
        async with world.agent(rollout) as agent:
            await agent.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "why not?"}],
                max_tokens=TOKENS,
                extra_body={"ignore_eos": True},
            )

    async def known() -> bool:
        async with world.agent("r0") as agent:
            return adapter_name("policy", 3) in [model.id async for model in agent.models.list()]

    await world.serve(2, adapters[2], "lora")
    over = asyncio.create_task(ask("over", adapter_name("policy", 2)))
    await world.half_way(1)
    applied = await world.serve(3, adapters[3], "lora")
    assert not over.done()
    assert "pause" not in applied.seconds
    await until(known, "the gateway does not know the adapter")
    await asyncio.gather(over, ask("after", adapter_name("policy", 3)), ask("kept", adapter_name("policy", 2)))
    await ask("newest", "policy")
    spans = {span.rollout_id: span for span in await world.spans()}
    oracles = {number: Oracle(models[1], adapter) for number, adapter in adapters.items()}
    for rollout, version in {"over": 2, "after": 3, "kept": 2, "newest": 3}.items():
        span = spans[rollout]
        assert [part.version for part in span.weight_versions] == [version]
        assert span.model == adapter_name("policy", version)
        whole = [VersionSpan(version=version, start=0, end=TOKENS)]
        tokens = (span.prompt_token_ids, span.response_token_ids, span.logprobs)
        assert worst_error(oracles, *tokens, whole) < TOLERANCE
        other = [VersionSpan(version=5 - version, start=0, end=TOKENS)]
        assert worst_error(oracles, *tokens, other) > 0.5  # the bound can fail

"""LoRA: the follower loads each version as a model of its own beside those before it, also while requests run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fulgurite.consumers.follower import draining
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.resources import adapter_name
from tests.vllm.tiny_model import Oracle, make_adapter, worst_error
from tests.vllm.world import TOLERANCE, World, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
TOKENS = 300
LONG = 1_900
"""Tokens; some ten seconds."""
PLACES = 2
"""For adapters in the server's memory (`--max-loras`)."""


async def ask(world: World, rollout: str, model: str, tokens: int = TOKENS) -> None:
    async with world.agent(rollout, max_retries=0) as agent:
        await agent.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "why not?"}],
            max_tokens=tokens,
            extra_body={"ignore_eos": True},
        )


async def test_each_version_is_an_adapter_and_a_request_keeps_the_one_it_began_with(
    world: World, models: dict[int, Path], tmp_path: Path
):
    adapters = {number: make_adapter(tmp_path / f"adapter{number}", number) for number in (2, 3)}

    async def known() -> bool:
        async with world.agent("r0") as agent:
            return adapter_name("policy", 3) in [model.id async for model in agent.models.list()]

    await world.serve(2, adapters[2], "lora")
    over = asyncio.create_task(ask(world, "over", adapter_name("policy", 2)))
    await world.half_way(1)
    applied = await world.serve(3, adapters[3], "lora")
    assert not over.done()
    assert "pause" not in applied.seconds
    await until(known, "the gateway does not know the adapter")
    await asyncio.gather(
        over, ask(world, "after", adapter_name("policy", 3)), ask(world, "kept", adapter_name("policy", 2))
    )
    await ask(world, "newest", "policy")
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


@pytest.mark.parametrize("world", ["one adapter"], indirect=True)
async def test_requests_on_adapters_that_were_unloaded_find_their_files_also_when_they_had_to_wait(
    world: World, models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where they do not, the engine ends: it reads them again when a load took their place in its memory."""
    monkeypatch.setattr(draining, "QUIET_SECONDS", 0.5)

    async def cached(*versions: int) -> bool:
        return sorted(int(path.name[1:7]) for path in (tmp_path / "versions" / "policy").glob("v*")) == [*versions]

    async def queued() -> bool:
        return await world.vllm.metric("vllm:num_requests_waiting") == 1

    asked: dict[int, asyncio.Task[None]] = {}
    for number in range(2, 7):
        await world.serve(number, make_adapter(tmp_path / f"adapter{number}", number), "lora")
        if len(asked) <= PLACES:
            asked[number] = asyncio.create_task(ask(world, f"on{number}", adapter_name("policy", number), LONG))
            await world.half_way(min(len(asked), PLACES))
    await until(queued, "nothing waits")
    await asyncio.sleep(6 * draining.QUIET_SECONDS)
    assert await cached(2, 3, 4, 5, 6), "what waits says not for which"
    asked[3].cancel()
    await until(lambda: cached(2, 4, 6), "the files of an adapter without requests stay")
    assert not asked[2].done()
    assert not asked[4].done()
    await asyncio.gather(asked[2], asked[4])
    await until(lambda: cached(6), "the files of adapters that were used stay")

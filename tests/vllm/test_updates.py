"""New weights under a running vLLM: which version gave which token, and that nothing of the old one is left behind."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from fulgurite.schemas.event import VersionSpan
from tests.vllm.tiny_model import Oracle, make_tokenizer, worst_error
from tests.vllm.world import TOLERANCE, World

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LONG = 600
"""Tokens of an answer that an update comes in the middle of: some seconds."""


@pytest.mark.parametrize("world", ["files", "transfer"], indirect=True)
async def test_an_update_in_the_middle_of_requests_gives_each_token_its_version(
    world: World, models: dict[int, Path], oracles: dict[int, Oracle]
):
    """Asked by token ids, vLLM itself says where the versions changed."""
    prompts = [make_tokenizer().encode("again and again, " * (number + 1)) for number in range(6)]
    sampling = {"max_tokens": LONG, "ignore_eos": True, "logprobs": 0}

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
        body = {"model": "policy", "token_ids": prompt, "sampling_params": sampling}
        return (await client.post("/inference/v1/generate", json=body)).raise_for_status().json()["choices"][0]

    async with httpx.AsyncClient(base_url=world.vllm.url, timeout=120) as client:
        asking = [asyncio.create_task(ask(client, prompt)) for prompt in prompts]
        await world.half_way(len(prompts))
        applied = await world.serve(2, models[2])
        assert not any(one.done() for one in asking)
        choices = await asyncio.gather(*asking)
    assert {"verify", "pause", "load", "resume"} <= set(applied.seconds)
    for prompt, choice in zip(prompts, choices, strict=True):
        versions = [VersionSpan(version=int(part.pop("version")), **part) for part in choice["weight_versions"]]
        assert [span.version for span in versions] == [1, 2]
        assert versions[0].end > 10
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert worst_error(oracles, prompt, choice["token_ids"], logprobs, versions) < TOLERANCE
        swapped = {1: oracles[2], 2: oracles[1]}
        assert worst_error(swapped, prompt, choice["token_ids"], logprobs, versions) > 0.5  # the bound can fail


@pytest.mark.parametrize("streamed", [False, True])
async def test_calls_through_the_gateway_go_on_over_an_update_and_claim_no_wrong_version(
    world: World, models: dict[int, Path], oracles: dict[int, Oracle], streamed: bool
):
    async def ask(number: int) -> None:
        async with world.agent(f"r{number}", max_retries=0) as agent:
            answer = await agent.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": f"again {number}"}],
                max_tokens=LONG,
                stream=streamed,
                extra_body={"ignore_eos": True},
            )
            if streamed:
                async for _ in answer:  # pyright: ignore[reportGeneralTypeIssues]
                    pass

    over = [asyncio.create_task(ask(number)) for number in range(4)]
    await world.half_way(len(over))
    await world.serve(2, models[2])
    assert not any(one.done() for one in over)
    await asyncio.gather(*over)
    await ask(4)
    spans = {span.rollout_id: span for span in await world.spans()}
    assert len(spans) == 5
    assert [part.version for part in spans["r4"].weight_versions] == [2]
    for span in spans.values():
        assert span.status == "ok", span.status_message
        assert len(span.response_token_ids) == len(span.logprobs) == LONG
        if span.weight_versions:
            tokens = (span.prompt_token_ids, span.response_token_ids, span.logprobs)
            assert worst_error(oracles, *tokens, span.weight_versions) < TOLERANCE
    assert not any(
        len({part.version for part in span.weight_versions}) == 1 for key, span in spans.items() if key != "r4"
    )


async def test_no_cached_prefix_outlives_its_weights(world: World, models: dict[int, Path], oracles: dict[int, Oracle]):
    """A prompt of several cache blocks, asked before and after an update, and again back to the first version."""
    content = "what was said is said again, and again: 0123456789 (a+b)*c " * 20

    async def ask(rollout: str) -> None:
        async with world.agent(rollout) as agent:
            messages: Any = [{"role": "user", "content": content}]
            await agent.chat.completions.create(model="policy", messages=messages, max_tokens=30)

    await ask("cold")
    hits = await world.vllm.metric("vllm:prefix_cache_hits_total")
    await ask("warm")
    assert await world.vllm.metric("vllm:prefix_cache_hits_total") >= hits + 256, (
        "the prompt was not cached: nothing is shown"
    )
    await world.serve(2, models[2])
    await ask("updated")
    await world.serve(3, models[1])  # the weights of 1 again, as version 3
    await ask("back")
    spans = {span.rollout_id: span for span in await world.spans()}
    of = {1: oracles[1], 2: oracles[2], 3: oracles[1]}
    for rollout, version in {"cold": 1, "warm": 1, "updated": 2, "back": 3}.items():
        span = spans[rollout]
        assert [part.version for part in span.weight_versions] == [version]
        tokens = (span.prompt_token_ids, span.response_token_ids, span.logprobs)
        assert worst_error(of, *tokens, span.weight_versions) < TOLERANCE


def damaged(folder: Path, good: Path, damage: str) -> Path:
    """A version that is none. That of the dtype cannot be seen before vLLM loads it: then half of it is loaded."""
    folder.mkdir()
    data = (good / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    if damage == "a tensor is missing":
        last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        data = data[: 8 + length + header.pop(last)["data_offsets"][0]]
    elif damage == "an unknown dtype":
        header["lm_head.weight"]["dtype"] = "F33"
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    (folder / "model.safetensors").write_bytes(b"no weights" if damage == "no file of weights" else data)
    return folder


@pytest.mark.parametrize(
    ("world", "damage"),
    [
        ("files", "no file of weights"),
        ("files", "a tensor is missing"),
        ("files", "an unknown dtype"),
        ("transfer", "an unknown dtype"),
    ],
    indirect=["world"],
)
async def test_requests_under_way_survive_a_broken_version(
    world: World, models: dict[int, Path], oracles: dict[int, Oracle], tmp_path: Path, damage: str
):
    async def ask(rollout: str) -> None:
        messages: Any = [{"role": "user", "content": "why not?"}]
        async with world.agent(rollout, max_retries=0) as agent:
            await agent.chat.completions.create(
                model="policy", messages=messages, max_tokens=LONG, extra_body={"ignore_eos": True}
            )

    asking = asyncio.create_task(ask("over"))
    await world.half_way(1)
    await world.publish(2, damaged(tmp_path / "broken", models[2], damage))
    refused = await world.reported(2)
    assert not refused.ok
    by_vllm = damage == "an unknown dtype" and world.settings.follower.load == "files"
    assert ("/collective_rpc" in refused.error) == by_vllm  # else seen before it
    assert world.vllm.running, "vLLM ended"
    await asyncio.wait_for(asking, 60)
    await ask("after")
    assert await world.vllm.label() == "1"
    for span in await world.spans():
        assert {part.version for part in span.weight_versions} <= {1}
        whole = [VersionSpan(version=1, start=0, end=LONG)]
        tokens = (span.prompt_token_ids, span.response_token_ids, span.logprobs)
        assert worst_error({1: oracles[1]}, *tokens, whole) < TOLERANCE


@pytest.mark.parametrize("world", ["transfer"], indirect=True)
async def test_what_a_broken_transfer_left_is_no_part_of_the_next_version(
    world: World, models: dict[int, Path], oracles: dict[int, Oracle], tmp_path: Path
):
    """A worker fails between the query's and the value's weights of a layer, which vLLM keeps as one tensor."""
    broken = tmp_path / "broken"
    shutil.copytree(models[2], broken)
    weights = load_file(broken / "model.safetensors")
    (name, *_) = sorted(name for name in weights if name.endswith("v_proj.weight"))
    weights[name] = weights[name].clone()
    weights[name][0, 0] = 12345.0
    save_file(weights, broken / "model.safetensors", {"format": "pt"})

    async def ask(rollout: str) -> None:
        async with world.agent(rollout, max_retries=0) as agent:
            messages: Any = [{"role": "user", "content": "what is left?"}]
            await agent.chat.completions.create(model="policy", messages=messages, max_tokens=20)

    await world.publish(2, broken)
    refused = await world.reported(2)
    assert not refused.ok
    assert "in the middle" in refused.error
    await ask("before")
    await world.serve(3, models[2])
    await ask("next")
    spans = {span.rollout_id: span for span in await world.spans()}
    for rollout, version, oracle in (("before", 1, oracles[1]), ("next", 3, oracles[2])):
        span = spans[rollout]
        assert [part.version for part in span.weight_versions] == [version]
        tokens = (span.prompt_token_ids, span.response_token_ids, span.logprobs)
        assert worst_error({version: oracle}, *tokens, span.weight_versions) < TOLERANCE

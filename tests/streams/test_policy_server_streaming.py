"""Streams: the same answers in pieces, exact over pauses and swaps, and ended when nobody reads them any more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from fulgurite.streams.policy_server.policy import Policy, load_policy
from tests.streams.policy_server_support import Served, assert_exact, events, folded, listening, make_model, served

MESSAGES: Any = [{"role": "user", "content": "Ada has 7 pens and finds 3 more. How many now?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    return make_model(base / "one", 1), make_model(base / "two", 2)


@pytest.fixture(scope="module")
def policies(folders: tuple[Path, Path]) -> dict[str, Policy]:
    return {"1": load_policy(folders[0]), "2": load_policy(folders[1])}


async def stream(server: Served, **parameters: Any) -> list[dict[str, Any]]:
    response = await server.chat(stream=True, **parameters)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


def check(policies: dict[str, Policy], chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    """That a choice is exact; gives the versions that sampled it."""
    whole = folded(chunks, index)
    spans = whole["weight_versions"]
    assert_exact(policies, chunks[0]["prompt_token_ids"], whole["token_ids"], whole["logprobs"], spans)
    return [span["version"] for span in spans]


async def test_a_stream_says_what_the_whole_answer_says(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        plain = (await server.chat(temperature=0)).json()
        chunks = await stream(server, temperature=0, stream_options={"include_usage": True})
        whole = folded(chunks)
        choice = plain["choices"][0]
        assert whole["content"] == choice["message"]["content"]
        assert whole["token_ids"] == choice["token_ids"]
        assert whole["logprobs"] == pytest.approx([entry["logprob"] for entry in choice["logprobs"]["content"]])
        assert whole["finish_reason"] == choice["finish_reason"]
        assert whole["weight_versions"] == choice["weight_versions"]
        assert chunks[0]["prompt_token_ids"] == plain["prompt_token_ids"]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], plain["usage"])
        assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert all(len(chunk["choices"][0]["token_ids"]) == 1 for chunk in chunks[2:-1])


async def test_nothing_that_was_not_asked_for_is_in_the_chunks(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        asked = {"return_token_ids": False, "return_weight_versions": False, "logprobs": False}
        chunks = await stream(server, max_tokens=5, **asked)
        assert not any("prompt_token_ids" in chunk or "usage" in chunk for chunk in chunks)
        for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
            assert not {"token_ids", "weight_versions"} & choice.keys()
            assert choice["logprobs"] is None


@pytest.mark.parametrize("streamed", [False, True])
async def test_n_answers_to_one_prompt(policies: dict[str, Policy], folders: tuple[Path, Path], streamed: bool) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        if streamed:
            chunks = await stream(server, n=3, max_tokens=20, stream_options={"include_usage": True})
            answers = [folded(chunks, index)["token_ids"] for index in range(3)]
            assert [check(policies, chunks, index) for index in range(3)] == [["1"]] * 3
            usage, prompt = chunks[-1]["usage"], chunks[0]["prompt_token_ids"]
        else:
            body = (await server.chat(n=3, max_tokens=20)).json()
            answers = [choice["token_ids"] for choice in body["choices"]]
            usage, prompt = body["usage"], body["prompt_token_ids"]
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert len({tuple(answer) for answer in answers}) == 3
        made = sum(len(answer) for answer in answers)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), made)


async def test_a_seed_makes_n_answers_repeatable_and_different(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        bodies = [(await server.chat(n=2, seed=7, max_tokens=20)).json() for _ in range(2)]
        first, again = ([choice["token_ids"] for choice in body["choices"]] for body in bodies)
        assert first == again
        assert first[0] != first[1]


@pytest.mark.parametrize("streamed", [False, True])
async def test_stop_strings_end_an_answer_and_are_not_in_it(
    policies: dict[str, Policy], folders: tuple[Path, Path], streamed: bool
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        full = (await server.chat(temperature=0)).json()["choices"][0]["message"]["content"]
        stop = full[20:26]
        before = full[: full.index(stop)]
        if streamed:
            chunks = await stream(server, temperature=0, stop=[stop, "never there"])
            whole = folded(chunks)
            assert check(policies, chunks) == ["1"]
            content, choice = whole["content"], whole
        else:
            choice = (await server.chat(temperature=0, stop=stop)).json()["choices"][0]
            content = choice["message"]["content"]
        assert (content, choice["finish_reason"], choice["stop_reason"]) == (before, "stop", stop)
        decoded = str(policies["1"].tokenizer.decode(choice["token_ids"], skip_special_tokens=True))
        assert decoded.startswith(before + stop)


async def test_streams_frozen_by_keep_go_on_with_the_new_weights_exactly(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        running = [asyncio.create_task(stream(server, n=1 + n % 2, temperature=1 - n % 2)) for n in range(16)]
        await server.until_running(20)
        await asyncio.sleep(0.05)
        (await server.client.post("/pause?mode=keep")).raise_for_status()
        held = asyncio.create_task(stream(server))
        await server.load(folders[1], "2")
        await server.client.post("/resume")
        found = [check(policies, chunks, n % 2) for n, chunks in enumerate(await asyncio.gather(*running))]
        assert ["1", "2"] in found
        assert check(policies, await held) == ["2"]


async def test_no_chunk_comes_during_a_pause(folders: tuple[Path, Path]) -> None:
    async with served() as server, listening(server) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        await server.load(folders[0], "1")
        body = {"model": "policy", "messages": MESSAGES, "stream": True, "temperature": 0}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            came = [await anext(lines)]

            async def read() -> None:
                async for line in lines:
                    came.append(line)

            (await server.client.post("/pause?mode=keep")).raise_for_status()
            reading = asyncio.create_task(read())
            await asyncio.sleep(0.1)
            before = len(came)
            await asyncio.sleep(0.1)
            assert (len(came), server.worker.running, reading.done()) == (before, 1, False)
            await server.client.post("/resume")
            await reading
            assert came[-2:] == ["data: [DONE]", ""]
            assert len(came) > before + 100


async def test_abort_ends_streams_with_what_they_have(policies: dict[str, Policy], folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        running = [asyncio.create_task(stream(server)) for _ in range(70)]
        await server.until_running(40)
        (await server.client.post("/pause?mode=abort")).raise_for_status()
        found = [folded(chunks) for chunks in await asyncio.gather(*running)]
        aborted = [whole for whole in found if whole["finish_reason"] == "abort"]
        assert aborted
        assert all(len(whole["token_ids"]) == len(whole["logprobs"]) for whole in aborted)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_client_that_hangs_up_ends_its_generations(folders: tuple[Path, Path], paused: bool) -> None:
    async with served() as server, listening(server) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        await server.load(folders[0], "1")
        body = {"model": "policy", "messages": MESSAGES, "stream": True, "n": 4}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            await anext(response.aiter_lines())
            if paused:
                (await server.client.post("/pause?mode=keep")).raise_for_status()
            assert server.worker.running > 0
        async with asyncio.timeout(5):
            while server.worker.running:  # noqa: ASYNC110 (no event for it)
                await asyncio.sleep(0.001)
        assert server.worker.requests_finished < 4
        assert "vllm:generation_tokens_total 0\n" not in (await server.client.get("/metrics")).text
        await server.client.post("/resume")
        assert (await server.chat(max_tokens=3)).status_code == 200


async def test_refusals_come_before_the_stream(folders: tuple[Path, Path]) -> None:
    async with served(max_waiting_requests=1) as server:
        assert (await server.chat(stream=True)).status_code == 503
        await server.load(folders[0], "1")
        assert (await server.chat(stream=True, stop=[""])).status_code == 400
        (await server.client.post("/pause?mode=keep")).raise_for_status()
        held = asyncio.create_task(stream(server, n=64, max_tokens=2))
        async with asyncio.timeout(20):
            while server.worker.waiting < 64:  # noqa: ASYNC110 (no event for it)
                await asyncio.sleep(0.001)
        refused = await server.chat(stream=True, n=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        await server.client.post("/resume")
        await held


async def test_the_openai_client_reads_streams(folders: tuple[Path, Path]) -> None:
    async with served() as server, listening(server) as url:
        await server.load(folders[0], "1")
        client = AsyncOpenAI(api_key="none", base_url=f"{url}/v1")
        asked: Any = {"model": "policy", "messages": MESSAGES, "temperature": 0}
        usage: Any = {"include_usage": True}
        chat = await client.chat.completions.create(**asked, stream=True, stream_options=usage)
        pieces = [chunk async for chunk in chat]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
        plain = await client.chat.completions.create(**asked)
        assert text == plain.choices[0].message.content
        assert pieces[-1].usage == plain.usage
        completion = await client.completions.create(model="policy", prompt="Ada has", stream=True, logprobs=0)
        assert [chunk async for chunk in completion][-1].choices[0].finish_reason in ("stop", "length")
        await client.close()

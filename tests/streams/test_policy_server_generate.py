"""Completions, generate, and the routes between messages, texts and tokens: shapes, exactness, refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from fulgurite.streams.policy_server.policy import Policy, load_policy
from tests.streams.policy_server_support import Served, assert_exact, events, make_model, served

MESSAGES: Any = [{"role": "user", "content": "Ada has 7 pens and finds 3 more. How many now?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    return make_model(base / "one", 1), make_model(base / "two", 2)


@pytest.fixture(scope="module")
def policies(folders: tuple[Path, Path]) -> dict[str, Policy]:
    return {"1": load_policy(folders[0]), "2": load_policy(folders[1])}


async def post(server: Served, path: str, **body: Any) -> httpx.Response:
    return await server.client.post(path, json=body)


async def answered(server: Served, path: str, **body: Any) -> dict[str, Any]:
    response = await post(server, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_completions_of_a_text_ids_and_lists_of_them(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        ids = (await answered(server, "/tokenize", prompt="Ada has 7"))["tokens"]
        extras = {"logprobs": 0, "return_token_ids": True, "return_weight_versions": True, "max_tokens": 12}
        for prompt, count in (("Ada has 7", 1), (ids, 1), (["Ada has 7", "Bob"], 2), ([ids, [9]], 2)):
            body = await answered(server, "/v1/completions", prompt=prompt, n=2, **extras)
            assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
            assert body["choices"][0]["prompt_token_ids"] == body["choices"][1]["prompt_token_ids"] == ids
            for choice in body["choices"]:
                logprobs = choice["logprobs"]
                assert_exact(
                    policies,
                    choice["prompt_token_ids"],
                    choice["token_ids"],
                    logprobs["token_logprobs"],
                    choice["weight_versions"],
                )
                assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"])
            prompts = [choice["prompt_token_ids"] for choice in body["choices"][::2]]
            assert body["usage"]["prompt_tokens"] == sum(len(prompt) for prompt in prompts)


async def test_a_completion_has_16_tokens_unless_it_says_otherwise(folders: tuple[Path, Path]) -> None:
    async with served(max_new_tokens=64) as server:
        await server.load(folders[0], "1")
        for asked, most in (({}, 16), ({"max_tokens": None}, 64), ({"max_tokens": 40}, 40)):
            bodies = [await answered(server, "/v1/completions", prompt="Ada", seed=seed, **asked) for seed in range(4)]
            counts = [body["usage"]["completion_tokens"] for body in bodies]
            assert max(counts) <= most
            assert most in counts


async def test_a_streamed_completion_says_what_the_whole_one_says(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        asked: dict[str, Any] = {"prompt": ["Ada has", "Bob"], "temperature": 0, "logprobs": 0, "stop": "7"}
        asked |= {"return_token_ids": True, "return_weight_versions": True, "max_tokens": 30}
        plain = await answered(server, "/v1/completions", **asked)
        response = await post(server, "/v1/completions", stream=True, stream_options={"include_usage": True}, **asked)
        chunks = events(response.text)
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], plain["usage"])
        for whole in plain["choices"]:
            parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == whole["index"]]
            assert "".join(part["text"] for part in parts) == whole["text"]
            assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
            assert parts[0]["prompt_token_ids"] == whole["prompt_token_ids"]
            for name in ("tokens", "text_offset"):
                assert [one for part in parts for one in part["logprobs"][name]] == whole["logprobs"][name]
            for name in ("finish_reason", "stop_reason", "weight_versions"):
                assert parts[-1][name] == whole[name]


async def test_a_rendered_chat_is_generated_as_the_chat_itself(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        chat = {"model": "policy", "messages": MESSAGES, "temperature": 0, "logprobs": True, "max_tokens": 25}
        rendered = await answered(server, "/v1/chat/completions/render", **chat)
        plain = (await server.chat(**chat)).json()
        assert rendered["token_ids"] == plain["prompt_token_ids"]
        for mode in ("tokens", "text"):
            asked = rendered | {"output_mode": mode, "return_token_ids": True}
            body = await answered(server, "/inference/v1/generate", **asked)
            (choice,) = body["choices"]
            assert choice["token_ids"] == plain["choices"][0]["token_ids"]
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert_exact(policies, body["prompt_token_ids"], choice["token_ids"], logprobs, choice["weight_versions"])
            assert (body["output_mode"], body["usage"]) == (mode, plain["usage"])
            assert choice.get("text") == (plain["choices"][0]["message"]["content"] if mode == "text" else None)
            if mode == "tokens":
                assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == choice["token_ids"]


async def test_a_generate_stream_carries_its_versions_over_a_swap(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        prompt = (await answered(server, "/tokenize", messages=MESSAGES))["tokens"]
        asked = {"token_ids": prompt, "sampling_params": {"logprobs": 0}, "stream": True, "request_id": "mine"}
        running = [asyncio.create_task(post(server, "/inference/v1/generate", **asked)) for _ in range(12)]
        await server.until_running(12)
        await asyncio.sleep(0.05)
        (await server.client.post("/pause?mode=keep")).raise_for_status()
        await server.load(folders[1], "2")
        await server.client.post("/resume")
        found: list[list[str]] = []
        for response in await asyncio.gather(*running):
            chunks = events(response.text)
            assert {chunk["request_id"] for chunk in chunks} == {"generate-tokens-mine"}
            choices = [chunk["choices"][0] for chunk in chunks]
            tokens = [token for choice in choices for token in choice["token_ids"]]
            logprobs = [entry["logprob"] for choice in choices for entry in choice["logprobs"]["content"]]
            assert not any(choice["weight_versions"] for choice in choices[:-1])
            spans = choices[-1]["weight_versions"]
            assert_exact(policies, prompt, tokens, logprobs, spans)
            found.append([span["version"] for span in spans])
        assert ["1", "2"] in found


async def test_texts_to_tokens_and_back(policies: dict[str, Policy], folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        text = "Ada has 7 pens."
        body = await answered(server, "/tokenize", prompt=text, return_token_strs=True)
        assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), policies["1"].max_positions)
        assert len(body["token_strs"]) == body["count"]
        assert (await answered(server, "/detokenize", tokens=body["tokens"])) == {"prompt": text}
        opened = (await answered(server, "/tokenize", messages=MESSAGES))["tokens"]
        closed = (await answered(server, "/tokenize", messages=MESSAGES, add_generation_prompt=False))["tokens"]
        assert opened[: len(closed)] == closed
        assert len(opened) > len(closed)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [1, 10_000]}, "prompt"),
        ("/v1/completions", {"prompt": [True]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 33, "n": 2}, "prompt"),
        ("/v1/completions", {"prompt": "7" * 600}, "prompt"),
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "a", "logprobs": 3}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "model": "another"}, "model"),
        ("/v1/completions", {"prompt": "a", "stream": "yes"}, "stream"),
        ("/v1/completions", {"prompt": "a", "stream_options": True}, "stream_options"),
        ("/inference/v1/generate", {"token_ids": [9]}, "sampling_params"),
        ("/inference/v1/generate", {"sampling_params": {}}, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [9], "sampling_params": {"top_p": 0.5}}, "top_p"),
        ("/inference/v1/generate", {"token_ids": [9], "sampling_params": {"seed": 2**70}}, "seed"),
        ("/inference/v1/generate", {"token_ids": [9], "sampling_params": {}, "output_mode": "x"}, "output_mode"),
        ("/inference/v1/generate", {"token_ids": [9], "sampling_params": {}, "request_id": 3}, "request_id"),
        ("/v1/chat/completions/render", {"messages": []}, "messages"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
async def test_bad_requests_name_the_field(
    folders: tuple[Path, Path], path: str, body: dict[str, Any], param: str
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        response = await post(server, path, **body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_which_routes_there_are(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        paths = (await server.client.get("/openapi.json")).json()["paths"]
        assert {"/inference/v1/generate", "/weight_checker", "/collective_rpc"} <= paths.keys()
        for path in ("/tokenize", "/detokenize", "/v1/chat/completions/render", "/inference/v1/generate"):
            assert (await post(server, path, prompt="a")).status_code == 503

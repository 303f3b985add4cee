"""What must not stop the server or spoil its answers: texts of any size, folders that are broken, tiny temperatures."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.streams.policy_server_support import make_model, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "one", 1)


def changed(folder: Path, target: Path, name: str, change: dict[str, Any] | str) -> Path:
    """A copy of the folder with fields of one of its JSON files set, or with another file in its place."""
    shutil.copytree(folder, target)
    if isinstance(change, str):
        (target / name).write_text(change)
    else:
        (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | change))
    return target


async def test_a_text_that_no_context_holds_is_refused_before_it_is_tokenised(folder: Path) -> None:
    text = "Ada has 7 pens. " * 250_000
    async with served() as server:
        await server.load(folder, "1")
        for path, body, param in (
            ("/v1/completions", {"prompt": text}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
            ("/tokenize", {"prompt": text}, "prompt"),
        ):
            response = await server.client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
            assert f"{4_000_000 if param == 'prompt' else 4_000_000 + len('<|user|><|end|><|assistant|>')} char" in str(
                error["message"]
            )


async def test_a_large_text_is_tokenised_beside_small_requests(folder: Path, tmp_path: Path) -> None:
    wide = changed(folder, tmp_path / "wide", "config.json", {"max_position_embeddings": 100_000})
    text = "Ada has 7 pens. " * 10_000
    async with served() as server:
        await server.load(wide, "1")
        small = (await server.client.post("/tokenize", json={"prompt": text[:16]})).json()["tokens"]
        large = [asyncio.create_task(server.client.post("/tokenize", json={"prompt": text})) for _ in range(2)]
        meanwhile = 0
        while not all(request.done() for request in large):
            response = await server.client.post("/tokenize", json={"prompt": text[:16]})
            assert response.json()["tokens"] == small
            meanwhile += 1
            await asyncio.sleep(0.005)  # this client never gives the loop up by itself
        assert meanwhile > 4
        tokens = [(await request).json()["tokens"] for request in large]
        assert tokens[0] == tokens[1]
        assert len(tokens[0]) == 70_000


async def test_more_tokens_than_the_context_are_not_decoded(folder: Path) -> None:
    async with served() as server:
        await server.load(folder, "1")
        response = await server.client.post("/detokenize", json={"tokens": [9] * 257})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_folders_that_are_broken_in_any_way_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    broken: list[tuple[str, dict[str, Any] | str, str]] = [
        ("chat_template.jinja", "{% if %}", "chat template"),
        ("chat_template.jinja", "{{ 1 / 0 }}", "ZeroDivisionError"),
        ("chat_template.jinja", "{{ raise_exception('no such role') }}", "no such role"),
        ("chat_template.jinja", "{% set nothing = 1 %}", "chat template"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("tokenizer.json", "[]", "cannot be loaded"),
        ("tokenizer_config.json", "[]", "cannot be loaded"),
        ("generation_config.json", "[]", "cannot be loaded"),
        ("generation_config.json", '{"eos_token_id": "x"}', "cannot be loaded"),
        ("config.json", {"num_attention_heads": 0}, "cannot be loaded"),
        ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings"),
    ]
    folders = [
        (changed(folder, tmp_path / f"broken{number}", name, change), reason)
        for number, (name, change, reason) in enumerate(broken)
    ]
    async with served() as server:
        await server.load(folder, "1")
        for path, reason in [*folders, (Path("/") / ("a" * 5_000), "cannot be loaded")]:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            response = await server.client.post("/collective_rpc", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "policy_refused"), (path, response.text)
            assert reason in error["message"]
        assert (await server.client.get("/weight_info")).json() == {"weight_version": "1"}
        assert (await server.chat(max_tokens=2)).status_code == 200


async def test_a_temperature_too_small_to_divide_by_is_greedy(folder: Path) -> None:
    async with served() as server:
        await server.load(folder, "1")
        answers = [
            (await server.chat(temperature=temperature, max_tokens=8)).json()["choices"][0]["token_ids"]
            for temperature in (0, 5e-324, 1e-40, 9e-6)
        ]
        assert all(answer == answers[0] for answer in answers)
        assert (await server.chat(temperature=1e-5, max_tokens=8)).json()["choices"][0]["token_ids"] == answers[0]

"""The routes, with the engine behind them: shapes, errors, and what every kind of pause and swap does to requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from fulgurite.streams.policy_server.policy import Policy, load_policy
from tests.streams.policy_server_support import assert_exact, make_model, served

LONG = [{"role": "user", "content": "Ada has 7 pens and finds 3 more. " * 14}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    return make_model(base / "one", 1), make_model(base / "two", 2)


@pytest.fixture(scope="module")
def policies(folders: tuple[Path, Path]) -> dict[str, Policy]:
    return {"1": load_policy(folders[0]), "2": load_policy(folders[1])}


def check(policies: dict[str, Policy], response: httpx.Response) -> list[str]:
    """That an answer is exact; gives the versions that sampled it."""
    assert response.status_code == 200, response.text
    body = response.json()
    choice = body["choices"][0]
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    spans = choice["weight_versions"]
    assert_exact(policies, body["prompt_token_ids"], choice["token_ids"], logprobs, spans)
    assert body["usage"]["completion_tokens"] == len(choice["token_ids"])
    return [span["version"] for span in spans]


async def test_without_weights_it_says_so_and_takes_control_calls() -> None:
    async with served() as server:
        for response in (await server.client.get("/health"), await server.chat()):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "not_ready"
        assert (await server.client.get("/weight_info")).json() == {"weight_version": "default"}
        assert (await server.client.post("/update_weight_version", json={"new_version": "1"})).status_code == 503
        assert (await server.client.post("/resume")).json() == {"status": "resumed"}
        assert (await server.client.post("/pause?mode=keep&clear_cache=true")).json() == {"status": "paused"}
        assert (await server.client.get("/is_paused")).json() == {"is_paused": True}


async def test_a_load_leaves_the_label_of_who_loads_and_no_number(folders: tuple[Path, Path]) -> None:
    load = {"method": "reload_weights", "kwargs": {"weights_path": str(folders[0])}}
    async with served() as server:
        (await server.client.post("/collective_rpc", json=load)).raise_for_status()
        for label, after in (("loading-1f", "loading-1f"), ("2", "default")):
            (await server.client.post("/update_weight_version", json={"new_version": label})).raise_for_status()
            (await server.client.post("/collective_rpc", json=load)).raise_for_status()
            assert (await server.client.get("/weight_info")).json() == {"weight_version": after}


async def test_a_follower_brings_it_from_nothing_to_serving(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        (await server.client.post("/pause?mode=keep")).raise_for_status()
        loaded = await server.client.post(
            "/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": str(folders[0])}}
        )
        assert loaded.json() == {"results": [None]}
        assert (await server.client.get("/weight_info")).json() == {"weight_version": "default"}
        named = await server.client.post("/update_weight_version", json={"new_version": "1"})
        assert named.json() == {"success": True, "new_version": "1"}
        assert (await server.client.post("/resume")).json() == {"status": "resumed"}
        assert (await server.client.get("/health")).status_code == 200
        assert (await server.client.get("/weight_info")).json() == {"weight_version": "1"}
        assert (await server.client.get("/v1/models")).json()["data"][0]["id"] == "policy"
        assert check(policies, await server.chat()) == ["1"]


async def test_after_a_swap_the_same_long_prompt_has_no_stale_cache(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        for version in ("1", "2", "1"):
            await server.load(folders[int(version) - 1], version)
            responses = await asyncio.gather(*[server.chat(messages=LONG, max_tokens=12) for _ in range(3)])
            assert [check(policies, response) for response in responses] == [[version]] * 3
            assert responses[0].json()["usage"]["prompt_tokens"] > 128


async def test_keep_freezes_requests_and_new_weights_continue_them_exactly(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        running = [asyncio.create_task(server.chat(temperature=n % 2)) for n in range(32)]
        await server.until_running(32)
        await asyncio.sleep(0.05)
        (await server.client.post("/pause?mode=keep")).raise_for_status()
        sampled = server.worker.running
        held = asyncio.create_task(server.chat())
        await server.load(folders[1], "2")
        await asyncio.sleep(0.05)
        assert not held.done()
        assert sampled > 0
        await server.client.post("/resume")
        versions = [check(policies, response) for response in await asyncio.gather(*running)]
        assert ["1", "2"] in versions
        assert check(policies, await held) == ["2"]


async def test_a_swap_without_a_pause_leaves_every_token_exact(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        running = [asyncio.create_task(server.chat()) for _ in range(32)]
        await server.until_running(32)
        await server.load(folders[1], "2")
        found = [check(policies | {"default": policies["2"]}, response) for response in await asyncio.gather(*running)]
        assert any(len(versions) > 1 for versions in found)


async def test_wait_finishes_what_runs_on_the_weights_it_has(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        running = [asyncio.create_task(server.chat()) for _ in range(8)]
        await server.until_running(8)
        (await server.client.post("/pause?mode=wait")).raise_for_status()
        assert server.worker.running == 0
        held = asyncio.create_task(server.chat())
        await server.load(folders[1], "2")
        await server.client.post("/resume")
        assert [check(policies, response) for response in await asyncio.gather(*running)] == [["1"]] * 8
        assert check(policies, await held) == ["2"]


async def test_abort_is_the_default_and_answers_with_what_there_is(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        running = [asyncio.create_task(server.chat()) for _ in range(8)]
        await server.until_running(8)
        (await server.client.post("/pause")).raise_for_status()
        reasons = {response.json()["choices"][0]["finish_reason"] for response in await asyncio.gather(*running)}
        assert "abort" in reasons
        assert reasons <= {"abort", "stop", "length"}


async def test_pauses_and_resumes_in_any_order(policies: dict[str, Policy], folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        for route in ("/resume", "/pause?mode=keep", "/pause?mode=keep", "/pause?mode=wait", "/resume", "/resume"):
            assert (await server.client.post(route)).status_code == 200
        running = asyncio.create_task(server.chat())
        await server.until_running(1)
        draining = asyncio.create_task(server.client.post("/pause?mode=wait"))
        await server.client.post("/resume")
        assert (await draining).status_code == 200
        assert check(policies, await running) == ["1"]


async def test_a_refused_reload_leaves_the_old_weights_serving(
    policies: dict[str, Policy], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        for kwargs in ({"weights_path": str(tmp_path)}, {}, {"weights_path": 3}):
            refused = await server.client.post("/collective_rpc", json={"method": "reload_weights", "kwargs": kwargs})
            assert refused.status_code == 400
            assert refused.json()["error"]["message"]
        assert (await server.client.get("/weight_info")).json() == {"weight_version": "1"}
        assert check(policies, await server.chat()) == ["1"]


async def test_weight_checker_tells_versions_apart(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        baseline = (await server.client.post("/weight_checker", json={"action": "checksum"})).json()["checksums"]
        compare: dict[str, Any] = {"action": "compare", "baseline": baseline}
        assert (await server.client.post("/weight_checker", json=compare)).json() == {"match": True, "mismatches": []}
        await server.load(folders[1], "2")
        assert (await server.client.post("/weight_checker", json=compare)).json()["match"] is False
        assert (await server.client.post("/weight_checker", json={"action": "reset"})).status_code == 400


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": "hello"}, "messages", None),
        ({"messages": [{"content": "no role"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": "7 " * 300}]}, "messages", "context_length_exceeded"),
        ({"model": "another"}, "model", "model_not_found"),
        ({"n": 0}, "n", None),
        ({"n": 65}, "n", None),
        ({"stream": "yes"}, "stream", None),
        ({"stop": ["a", ""]}, "stop", None),
        ({"stop": ["a"] * 17}, "stop", None),
        ({"seed": 2**70}, "seed", None),
        ({"stream_options": {"include_usage": 1}}, "include_usage", None),
        ({"response_format": {"type": "json_object"}}, "response_format", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"top_p": 0.5}, "top_p", None),
        ({"temperature": -1}, "temperature", None),
        ({"temperature": "hot"}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": "many"}, "max_tokens", None),
    ],
)
async def test_bad_requests_name_the_field(
    folders: tuple[Path, Path], parameters: dict[str, Any], param: str, code: str | None
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        response = await server.chat(**parameters)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, code)
        assert error["type"] == "invalid_request_error"


async def test_bodies_that_are_not_json_or_too_large(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        for content in (b"", b"{", b"[]", b" " * (9 * 1024 * 1024)):
            response = await server.client.post("/v1/chat/completions", content=content)
            assert response.status_code == 400
            assert response.json()["error"]["message"]
        assert (await server.client.post("/pause?mode=sideways")).status_code == 400
        assert (await server.client.post("/update_weight_version", json={"new_version": 3})).status_code == 400
        assert (await server.client.post("/collective_rpc", json={"method": "shutdown"})).status_code == 400


async def test_max_tokens_is_capped_by_the_request_the_setting_and_the_context(folders: tuple[Path, Path]) -> None:
    async with served(max_new_tokens=20) as server:
        await server.load(folders[0], "1")
        for parameters in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3_000}, {}):
            tokens = (await server.chat(**parameters)).json()["usage"]["completion_tokens"]
            assert tokens <= (3 if 3 in parameters.values() else 20)
        full = await server.chat(messages=[{"role": "user", "content": "7" * 250}])
        assert full.json()["usage"]["total_tokens"] <= 256


async def test_the_queue_is_bounded_and_requests_of_gone_clients_leave_it(folders: tuple[Path, Path]) -> None:
    async with served(max_waiting_requests=1) as server:
        await server.load(folders[0], "1")
        (await server.client.post("/pause?mode=keep")).raise_for_status()
        held = [asyncio.create_task(server.chat(max_tokens=2)) for _ in range(65)]
        async with asyncio.timeout(20):
            while server.worker.waiting < 65:  # noqa: ASYNC110 (no event for it)
                await asyncio.sleep(0.001)
        refused = await server.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        held.pop().cancel()
        async with asyncio.timeout(20):
            while server.worker.waiting > 64:  # noqa: ASYNC110 (no event for it)
                await asyncio.sleep(0.001)
        await server.client.post("/resume")
        assert {response.status_code for response in await asyncio.gather(*held)} == {200}


async def test_a_client_that_leaves_while_it_is_served_frees_its_row(
    policies: dict[str, Policy], folders: tuple[Path, Path]
) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        calls = [asyncio.create_task(server.chat(max_tokens=120)) for _ in range(6)]
        await server.until_running(6)
        for call in calls[:3]:
            call.cancel()
        assert [check(policies, response) for response in await asyncio.gather(*calls[3:])] == [["1"]] * 3
        assert server.worker.running == 0


async def test_openai_client_and_the_fields_it_did_not_ask_for(folders: tuple[Path, Path]) -> None:
    async with served() as server:
        await server.load(folders[0], "1")
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(server.app))
        async with AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http) as client:
            completion = await client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": [{"type": "text", "text": "Ada has 7 pens."}]}],
                temperature=0,
                max_tokens=5,
                user="ignored",
            )
        assert completion.choices[0].logprobs is None
        assert completion.usage is not None
        assert completion.usage.completion_tokens <= 5
        raw = (await server.chat(return_token_ids=False, logprobs=False, return_weight_versions=False)).json()
        assert "prompt_token_ids" not in raw
        assert not {"token_ids", "weight_versions"} & raw["choices"][0].keys()
        metrics = (await server.client.get("/metrics")).text
        assert "vllm:request_success_total 2" in metrics

"""Tiny models in folders, a policy server without a process, and the oracle: transformers' own forward."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from starlette.applications import Starlette

from examples.calculator.model import new_model, train_tokenizer
from fulgurite.infra.ports import free_port
from fulgurite.producers.service import serve_asgi
from fulgurite.schemas.settings import PolicyServerSettings
from fulgurite.streams.policy_server.app import create_app
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.worker import Worker

TOLERANCE = 1e-4


def make_model(folder: Path, seed: int) -> Path:
    """A model with random weights: nearly uniform, so that generations are long. Greedy ones are of seeds 4 and 5,
    whose likeliest token does not end the text."""
    torch.manual_seed(seed + 3)
    tokenizer = train_tokenizer(seed=1, conversations=300)
    new_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def plain_logprobs(policy: Policy, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary]: the distribution of each generated token, from one forward over everything."""
    ids = torch.tensor([[*prompt, *tokens]])
    model: Any = policy.model
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]


def assert_exact(
    policies: dict[str, Policy],
    prompt: Sequence[int],
    tokens: Sequence[int],
    logprobs: Sequence[float],
    spans: Sequence[dict[str, Any]],
) -> None:
    """Every token's logprob is what the version that its span names gives it; spans cover all tokens without gaps."""
    assert [span["start"] for span in spans] == [0, *[span["end"] for span in spans[:-1]]]
    assert spans[-1]["end"] == len(tokens) == len(logprobs)
    for span in spans:
        expected = plain_logprobs(policies[span["version"]], prompt, tokens)
        for at in range(span["start"], span["end"]):
            assert abs(float(expected[at, tokens[at]]) - logprobs[at]) < TOLERANCE, (span, at)


def events(stream: str) -> list[dict[str, Any]]:
    """The chunks of a stream of server-sent events that came to its end."""
    parts = stream.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def folded(chunks: Sequence[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """One choice of a chat completion's stream, in the shape of an answer that was not streamed."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    whole: dict[str, Any] = dict(choices[-1])
    whole["content"] = "".join(choice["delta"]["content"] for choice in choices)
    whole["token_ids"] = [token for choice in choices for token in choice.get("token_ids") or []]
    found = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    whole["logprobs"] = [entry["logprob"] for content in found for entry in content]
    return whole


@dataclass
class Served:
    worker: Worker
    client: httpx.AsyncClient
    app: Starlette

    async def chat(self, **parameters: Any) -> httpx.Response:
        body: dict[str, Any] = {
            "model": "policy",
            "messages": [{"role": "user", "content": "Ada has 7 pens and finds 3 more. How many now?"}],
            "logprobs": True,
            "return_token_ids": True,
            "return_weight_versions": True,
        }
        return await self.client.post("/v1/chat/completions", json=body | parameters)

    async def load(self, folder: Path, version: str) -> None:
        """What a follower does, without a pause."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        (await self.client.post("/collective_rpc", json=body)).raise_for_status()
        (await self.client.post("/update_weight_version", json={"new_version": version})).raise_for_status()

    async def until_running(self, count: int) -> None:
        async with asyncio.timeout(20):
            while self.worker.running < count:  # noqa: ASYNC110 (the engine has no event for it)
                await asyncio.sleep(0.001)


@asynccontextmanager
async def served(**settings: Any) -> AsyncGenerator[Served]:
    torch.set_num_threads(1)
    own = PolicyServerSettings(**settings)
    worker = Worker(own.max_waiting_requests)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield

    stepping = asyncio.create_task(worker.run())
    app = create_app(worker, own, lifespan)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield Served(worker, client, app)
    stepping.cancel()
    with suppress(asyncio.CancelledError):
        await stepping


@asynccontextmanager
async def listening(server: Served) -> AsyncGenerator[str]:
    """The server behind a socket, for clients that hang up; gives its URL."""
    port = free_port()
    stop = asyncio.Event()
    serving = asyncio.create_task(serve_asgi(server.app, "127.0.0.1", port, stop, "policy-server"))
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(20):
            while True:
                try:
                    await client.get("/health")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.01)
        yield url
    finally:
        stop.set()
        await serving

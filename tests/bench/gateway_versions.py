"""From a version published on `resources` to the first token it sampled, as an agent sees it (tests/bench/gateway.py).

A follower, the embedded policy server and a gateway of their own as processes, on the benchmark's broker. An agent asks
for one token at a time, always; the time is from before `publish` to the end of the first answer that says the version.
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from fulgurite.infra.ports import free_port
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import RESOURCES

if TYPE_CHECKING:
    from tests.bench.gateway import Figures, Rig

RESOURCE: Final = "policy"
SERVED_SECONDS: Final = 120.0
"""Longest that a version may take until it is served; the first waits for torch to be imported."""
SETTLE_SECONDS: Final = 1.0
"""Between two versions."""


def publish_to_served(rig: Rig, versions: int) -> Figures:
    """The first version is to start with; `versions` more are measured."""
    print(f"\nfrom publish to the first token served, {versions} versions")
    folders = make_models(rig.folder / "models", versions + 1)
    policy_port, gateway_port = free_port(), free_port()
    policy = {"policy_server": {"port": policy_port}}
    follower = {
        "follower": {
            "servers": [f"http://127.0.0.1:{policy_port}"],
            "resource": RESOURCE,
            "cache_folder": rig.folder / "versions",
        }
    }
    gateway = {"gateway": {"port": gateway_port, "backend_url": f"http://127.0.0.1:{policy_port}"}}
    with (
        rig.service("policy-server", "fulgurite.streams.policy_server", policy),
        rig.service("follower", "fulgurite.consumers.follower", follower),
        rig.service("gateway-of-versions", "fulgurite.producers.gateway", gateway),
    ):
        seconds = asyncio.run(publish_all(rig.settings, gateway_port, folders))
    figures = {
        "publish_to_served_seconds": statistics.median(seconds),
        "publish_to_served_seconds_max": max(seconds),
    }
    for name, value in figures.items():
        print(f"  {name:44s} {value:12,.3f}")
    return figures


def make_models(folder: Path, count: int) -> list[Path]:
    """The calculator's policy with random weights, one a version."""
    import torch

    from examples.calculator.model import new_model, train_tokenizer

    tokenizer = train_tokenizer(seed=1, conversations=300)
    folders = [folder / f"v{number}" for number in range(1, count + 1)]
    for seed, path in enumerate(folders):
        torch.manual_seed(seed)
        new_model(tokenizer).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return folders


async def publish_all(kafka: KafkaSettings, port: int, folders: list[Path]) -> list[float]:
    """Seconds each took, but for the first."""
    seconds: list[float] = []
    async with Publisher(kafka) as publisher, aiohttp.ClientSession() as session:
        for number, folder in enumerate(folders, 1):
            version = ResourceVersion(
                resource=RESOURCE, version=number, uri=folder.as_uri(), sha256=folder_sha256(folder), run_id="bench"
            )
            began = time.perf_counter()
            await (await publisher.publish(RESOURCES, RESOURCE, version))
            async with asyncio.timeout(SERVED_SECONDS):
                while await served_version(session, port) != str(number):
                    pass
            seconds.append(time.perf_counter() - began)
            print(f"  version {number} {seconds[-1]:40.3f}", flush=True)
            await asyncio.sleep(SETTLE_SECONDS)
    return seconds[1:]


async def served_version(session: aiohttp.ClientSession, port: int) -> str:
    """The version that samples a token now; empty where none does yet."""
    url = f"http://127.0.0.1:{port}/rollout/versions/attempt/a1/v1/chat/completions"
    body: dict[str, Any] = {
        "model": RESOURCE,
        "messages": [{"role": "user", "content": "How much is 93 * 74?"}],
        "max_tokens": 1,
        "return_weight_versions": True,
    }
    try:
        async with session.post(url, json=body) as response:
            if response.status == 200:
                spans = (await response.json())["choices"][0].get("weight_versions")
                return spans[-1]["version"] if spans else ""
    except aiohttp.ClientConnectorError:
        pass  # it is starting
    await asyncio.sleep(0.05)
    return ""

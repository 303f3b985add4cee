"""LoRA through the gateway: a resource's name means its newest adapter, and spans name the adapter's version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.pool import Pool
from fulgurite.producers.gateway.routing import LOST_ADAPTERS
from fulgurite.schemas.settings import BackendSettings, GatewaySettings
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import FakePublisher, client, serving, well

MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


@dataclass
class FakeLora(FakePolicyServer):
    """Weights of version 1 under the name `base`, and adapters."""

    label: str | None = "1"
    weights: int = 10
    base: str = "base"
    adapters: list[int] = field(default_factory=list[int])

    @property
    def names(self) -> list[str]:
        return [self.base, *(f"policy-v{version}" for version in self.adapters)]

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.names]})

    def _answering(self, whole: Any, events: Any) -> Any:
        usual = super()._answering(whole, events)

        async def answer(request: Request) -> Response:
            model = (await request.json())["model"]
            if model not in self.names:
                return JSONResponse({"error": {"message": f"The model `{model}` does not exist."}}, 404)
            return await usual(request)

        return answer

    @property
    def asked(self) -> list[str]:
        """The models that were asked for, in order."""
        return [request["model"] for request in self.requests]


@dataclass
class Setup:
    servers: list[FakeLora]
    pool: Pool
    url: str
    publisher: FakePublisher

    async def ask(self, model: str = "policy", rollout: str = "r1", **more: Any) -> Any:
        async with client(self.url, rollout) as agent:
            answer: Any = await agent.chat.completions.create(model=model, messages=MESSAGES, **more)
            return [chunk async for chunk in answer] if more.get("stream") else answer

    async def know(self, *newest: int | None) -> None:
        """Returns when the gateway knows what the servers have."""
        members = self.pool._members.all  # pyright: ignore[reportPrivateUsage]
        await until(lambda: [member.newest_adapter("policy") for member in members] == list(newest))


@asynccontextmanager
async def setup(*servers: FakeLora, health_seconds: float = 0.05, **more: Any) -> AsyncGenerator[Setup]:
    publisher = FakePublisher()
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        backends = [BackendSettings(url=server.url) for server in servers]
        settings = GatewaySettings(backends=backends, health_seconds=health_seconds, exact_prompts=False, **more)
        pool = await stack.enter_async_context(Pool(settings))
        url = await stack.enter_async_context(serving(Gateway(settings, pool, publisher, well)))
        yield Setup(list(servers), pool, url, publisher)


@pytest.mark.parametrize("base", ["base", "policy"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("gives_versions", [False, True])
async def test_the_resources_name_means_its_newest_adapter(base: str, stream: bool, gives_versions: bool):
    async with setup(FakeLora(base=base, adapters=[9, 10], gives_versions=gives_versions)) as gateway:
        await gateway.know(10)
        await gateway.ask(stream=stream)
        gateway.servers[0].adapters.append(11)
        await gateway.know(11)
        await gateway.ask(stream=stream)
        assert gateway.servers[0].asked == ["policy-v10", "policy-v11"]
    versions = [[part.model_dump() for part in span.weight_versions] for span in gateway.publisher.spans]
    assert versions == [[{"version": number, "start": 0, "end": 3}] for number in (10, 11)]
    assert {span.resource for span in gateway.publisher.spans} == {"policy"}
    assert "/weight_info" not in gateway.servers[0].log, "labels are of the weights below"


async def test_an_adapter_asked_by_its_own_name_is_recorded_as_its_version():
    async with setup(FakeLora(adapters=[9, 10])) as gateway:
        await gateway.know(10)
        await gateway.ask("policy-v9")
        await gateway.ask("base")
    assert gateway.servers[0].asked == ["policy-v9", "base"]
    assert [span.weight_versions[0].version for span in gateway.publisher.spans] == [9, 1]


async def test_an_answer_without_ids_names_the_adapters_version_too():
    async with setup(FakeLora(adapters=[9])) as gateway:
        await gateway.know(9)
        body = {"model": "policy", "max_tokens": 3, "messages": MESSAGES}
        async with httpx.AsyncClient() as agent:
            await agent.post(f"{gateway.url}/rollout/r1/attempt/a1/v1/messages", json=body)
    assert gateway.publisher.spans[0].attributes["fulgurite.weight_version_labels"] == ["9"]


async def test_only_servers_that_have_the_newest_are_asked():
    async with setup(FakeLora(adapters=[2]), FakeLora(adapters=[2, 3]), FakeLora()) as gateway:
        await gateway.know(2, 3, None)
        await asyncio.gather(*(gateway.ask(rollout=f"r{number}") for number in range(8)))
        assert [len(server.requests) for server in gateway.servers] == [0, 8, 0]
        gateway.servers[0].adapters.append(3)
        await gateway.know(3, 3, None)
        await asyncio.gather(*(gateway.ask(rollout=f"r{number}") for number in range(16)))
        assert gateway.servers[0].requests
    assert {span.weight_versions[0].version for span in gateway.publisher.spans} == {3}


async def test_where_one_has_a_newer_adapter_the_others_are_looked_at_until_they_have_it():
    """It would get all calls until then, and keep those in its line."""
    async with setup(FakeLora(adapters=[2]), FakeLora(adapters=[2]), FakeLora(), health_seconds=2.0) as gateway:
        await gateway.know(2, 2, None)
        gateway.servers[2].adapters = [2]
        await until(lambda: gateway.pool._members.all[2].newest_adapter("policy") == 2, 1)  # pyright: ignore[reportPrivateUsage]
        gateway.servers[0].adapters.append(3)
        await gateway.know(3, 2, 2)
        began = asyncio.get_running_loop().time()
        gateway.servers[1].adapters.append(3)
        await asyncio.sleep(0.4)
        gateway.servers[2].adapters.append(3)
        await gateway.know(3, 3, 3)
        assert asyncio.get_running_loop().time() - began < 1.5


@pytest.mark.parametrize("finds", ["models", "relist"])
async def test_who_finds_a_newer_adapter_between_two_looks_wakes_the_others_too(finds: str):
    async with setup(FakeLora(adapters=[2]), FakeLora(adapters=[2]), health_seconds=10.0) as gateway:
        await gateway.know(2, 2)
        gateway.servers[0].adapters.append(3)
        if finds == "models":
            await gateway.pool.models()
        else:
            with pytest.raises(openai.NotFoundError):
                await gateway.ask("not known yet")
        await gateway.know(3, 2)
        gateway.servers[1].adapters.append(3)
        async with asyncio.timeout(2):
            await gateway.know(3, 3)


async def test_without_the_server_of_the_newest_the_next_best_is_asked():
    async with setup(FakeLora(adapters=[2]), FakeLora(adapters=[3])) as gateway:
        await gateway.know(2, 3)
        await gateway.servers[1].stop()
        members = gateway.pool._members.all  # pyright: ignore[reportPrivateUsage]
        await until(lambda: not members[1].well)
        await gateway.ask()
    assert gateway.publisher.spans[0].weight_versions[0].version == 2


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("base", ["base", "policy"])
async def test_a_server_that_lost_its_adapters_is_waited_for(base: str, known: bool):
    async with setup(FakeLora(base=base, adapters=[3])) as gateway:
        await gateway.know(3)
        (server,) = gateway.servers
        server.adapters = []  # started anew: the follower loads the newest again
        if known:
            await gateway.know(LOST_ADAPTERS)
        asking = asyncio.create_task(gateway.ask())
        await asyncio.sleep(0.2)
        assert not asking.done()
        server.adapters = [4]
        await asking
        assert server.asked == ["policy-v4"]


async def test_models_name_the_resource():
    async with setup(FakeLora(adapters=[3])) as gateway:
        await gateway.know(3)
        async with client(gateway.url) as agent:
            names = [model.id async for model in agent.models.list()]
    assert sorted(names) == ["base", "policy", "policy-v3"]


async def test_a_resource_without_adapters_is_a_model_like_others():
    async with setup(FakeLora()) as gateway:
        with pytest.raises(openai.NotFoundError):
            await gateway.ask()

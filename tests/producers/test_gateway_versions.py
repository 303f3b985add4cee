"""Servers whose weights have no version, beside those that have one: after a restart they have a model of their own,
until the follower gives them the newest version."""

from __future__ import annotations

import asyncio

import openai
import pytest
from aiohttp import web

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.pool import Pool
from fulgurite.schemas.settings import BackendSettings, GatewaySettings
from tests.producers.fake_backend import FakeBackend
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES, FakePublisher, client, serving, well
from tests.producers.test_gateway_pool import ask, asked_by, asking, fakes, pool_of, refused

ROLLOUTS = [f"r{number}" for number in range(8)]
DERENDER = "/v1/chat/completions/derender"


async def by_pin(pool: Pool) -> set[str]:
    return {await asked_by(pool, pin=pin) for pin in ROLLOUTS}


async def restart(fake: FakeBackend) -> None:
    """As a supervisor does: the model it was started with, which nobody has numbered."""
    await fake.stop()
    fake.label = "default"
    await fake.start()


async def say(pool: Pool, *behind: bool) -> None:
    """Returns when the pool knows who has no version."""
    members = pool._members.all  # pyright: ignore[reportPrivateUsage]
    await until(lambda: [member.capacity.behind for member in members] == list(behind))


@pytest.mark.parametrize("gives_versions", [False, True])
@pytest.mark.parametrize("health_seconds", [0.05, 60.0])
async def test_a_server_that_was_restarted_is_not_asked_until_it_has_a_version(
    gives_versions: bool, health_seconds: float
):
    publisher = FakePublisher()

    async def versions(url: str) -> set[int]:
        begun = len(publisher.spans)
        for rollout in ROLLOUTS:
            async with client(url, rollout) as agent:
                await agent.chat.completions.create(model="policy", messages=MESSAGES)
        return {span.response_token_ids[0] for span in publisher.spans[begun:]}

    one, two = (FakePolicyServer(weights=70, label="7", gives_versions=gives_versions) for _ in range(2))
    async with one, two:
        backends = [BackendSettings(url=server.url) for server in (one, two)]
        settings = GatewaySettings(backends=backends, health_seconds=health_seconds)
        async with Pool(settings) as pool, serving(Gateway(settings, pool, publisher, well)) as url:
            assert await versions(url) == {70}
            asked = len(one.requests)
            assert asked
            await one.restart(label="default", weights=1)
            assert await versions(url) == {70}
            assert len(one.requests) == asked
            one.label, one.weights = "8", 80
            await say(pool, False, False)
            assert await versions(url) == {70, 80}


async def test_one_that_is_alone_is_waited_for():
    async with FakeBackend(label="7") as fake, pool_of(fake.settings(), health_seconds=0.05) as pool:
        await ask(pool)
        await restart(fake)
        error = await refused(pool, seconds=0.4)
        assert (error.status, error.code) == (503, "backend_unavailable")
        assert fake.completions == 1
        asking = asyncio.create_task(ask(pool))
        await asyncio.sleep(0.2)
        assert not asking.done()
        fake.label = "8"
        await asking
        assert fake.completions == 2


async def test_one_that_comes_back_without_the_route_for_it_is_asked():
    async with FakeBackend(label="7") as fake, pool_of(fake.settings(), health_seconds=0.05) as pool:
        await ask(pool)
        await restart(fake)
        await say(pool, True)
        fake.label = None
        await ask(pool)


async def test_what_was_sampled_is_put_into_words_whatever_the_version():
    async with FakeBackend(label="7") as fake, pool_of(fake.settings(), health_seconds=0.05) as pool:
        await ask(pool)
        await restart(fake)
        await say(pool, True)
        assert (await ask(pool, route=DERENDER, past_bounds=True))[0] == 200


async def test_a_new_replica_beside_one_with_a_version_is_not_asked_even_where_that_is_away():
    async with fakes(2) as (old, new):
        new.label = "default"
        async with pool_of(old.settings(), new.settings(), health_seconds=0.05) as pool:
            await say(pool, False, True)
            assert await by_pin(pool) == {"0"}
            await old.stop()
            assert (await refused(pool, seconds=0.4)).status == 503
            assert not new.completions
            new.label = "1"
            assert await by_pin(pool) == {"1"}


@pytest.mark.parametrize("label", ["default", None, "by hand"])
async def test_servers_that_never_had_a_version_are_asked_as_they_are(label: str | None):
    async with fakes(2) as servers:
        for server in servers:
            server.label = label
        async with pool_of(*(server.settings() for server in servers), health_seconds=0.05) as pool:
            assert await by_pin(pool) == {"0", "1"}
            for server in servers:
                await server.stop()
                await server.start()
            async with asyncio.timeout(10):
                while await by_pin(pool) != {"0", "1"}:  # noqa: ASYNC110 (a check may have found one away)
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("label", [None, "by hand", "loading-1"])
async def test_only_the_name_of_the_weights_a_server_starts_with_says_that_there_is_no_version(label: str | None):
    async with fakes(2) as (old, other):
        other.label = label
        async with pool_of(old.settings(), other.settings(), health_seconds=0.05) as pool:
            await asyncio.sleep(0.2)
            assert await by_pin(pool) == {"0", "1"}


async def test_servers_of_other_models_and_providers_do_not_count():
    async with fakes(3) as (policy, judge, provider):
        judge.models, judge.label = ["judge"], "default"
        backends = [policy.settings(), judge.settings(), provider.settings(kind="openai", models=["gpt"])]
        async with pool_of(*backends, health_seconds=0.05) as pool:
            await asyncio.sleep(0.2)
            assert [await asked_by(pool, model) for model in ("policy", "judge", "gpt")] == ["0", "1", "2"]
        assert "/weight_info" not in provider.asked


async def test_labels_do_not_count_where_adapters_are_served():
    async with fakes(2) as (one, two):
        two.label = "default"
        for server in (one, two):
            server.models = ["base", "policy-v3"]
        async with pool_of(one.settings(), two.settings(), health_seconds=0.05) as pool:
            await asyncio.sleep(0.2)
            assert {await asked_by(pool, "policy", pin=pin, body_for=lambda _: b"{}") for pin in ROLLOUTS} == {"0", "1"}


async def test_calls_do_not_ask_for_it():
    """A server that says its version in every answer is asked by health checks, and once after a lost connection."""

    async def versioned(request: web.Request) -> web.StreamResponse:
        return web.json_response({"by": "it", "weight_versions": []})

    async def calls(pool: Pool) -> None:
        for _ in range(20):
            async with pool.open(asking()) as exchange:
                assert [chunk async for chunk in exchange.chunks()]
                await exchange.version_after()

    async with FakeBackend(label="7", answer=versioned) as fake, pool_of(fake.settings(), health_seconds=60) as pool:
        await calls(pool)
        known = fake.asked.count("/weight_info")
        await calls(pool)
        assert fake.asked.count("/weight_info") == known
        await fake.stop()
        await fake.start()
        await calls(pool)
        assert fake.asked.count("/weight_info") == known + 1


async def test_an_agent_is_told_that_nobody_has_a_version():
    publisher = FakePublisher()
    async with FakePolicyServer(weights=70, label="7") as server:
        settings = GatewaySettings(backend_url=server.url, health_seconds=0.05, backend_seconds=1.0)
        async with (
            Pool(settings) as pool,
            serving(Gateway(settings, pool, publisher, well)) as url,
            client(url) as agent,
        ):
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
            await server.restart(label="default", weights=1)
            with pytest.raises(openai.InternalServerError) as failure:
                await agent.chat.completions.create(model="policy", messages=MESSAGES)
    assert failure.value.status_code == 503
    assert "version" in str(failure.value)

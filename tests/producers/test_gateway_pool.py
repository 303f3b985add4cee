"""The pool against real servers: who is asked, who is asked instead, what is bounded, and what an end frees."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import generate_latest

from fulgurite.producers.gateway.away import MAX_BROKEN_TRIES
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import Ask, Backends
from fulgurite.producers.gateway.pool import Pool
from fulgurite.producers.gateway.replica import Replica
from fulgurite.schemas.settings import BackendSettings, GatewaySettings
from tests.producers.fake_backend import FakeBackend, breaks_at_once, never, with_status
from tests.producers.fake_policy_server import until

CHAT = "/v1/chat/completions"


def asking(model: str = "policy", *, seconds: float = 10.0, pin: str = "", **values: Any) -> Ask:
    deadline = asyncio.get_running_loop().time() + seconds
    said: dict[str, Any] = {"route": CHAT, "body_for": lambda kind: b"{}", "authorization": ""} | values
    return Ask(model=model, pin=pin, deadline=deadline, **said)


async def ask(pool: Pool, *args: Any, **values: Any) -> tuple[int, bytes]:
    async with pool.open(asking(*args, **values)) as exchange:
        return exchange.status, b"".join([chunk async for chunk in exchange.chunks()])


async def asked_by(pool: Pool, *args: Any, **values: Any) -> str:
    _, body = await ask(pool, *args, **values)
    return json.loads(body)["by"]


async def refused(pool: Pool, *args: Any, **values: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await ask(pool, *args, **values)
    return caught.value


@asynccontextmanager
async def pool_of(*backends: BackendSettings, **values: Any) -> AsyncGenerator[Pool]:
    async with Pool(GatewaySettings(backends=list(backends), **values)) as pool:
        yield pool


@asynccontextmanager
async def fakes(count: int) -> AsyncGenerator[list[FakeBackend]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeBackend(name=str(index))) for index in range(count)]


async def test_the_short_form_is_one_backend_that_gets_the_agents_token():
    async with FakeBackend() as fake, Pool(GatewaySettings(backend_url=f"{fake.url}/v1/", resource="p")) as pool:
        backends: Backends = pool
        async with backends.open(asking(authorization="Bearer fg-r1/a1/sk-1", body_for=str.encode)) as exchange:
            assert json.loads(b"".join([chunk async for chunk in exchange.chunks()])) == {"by": "backend"}
            assert (exchange.endpoint, exchange.resource, exchange.kind) == (fake.url, "p", "vllm")
            assert (exchange.status, exchange.tries, exchange.headers["content-type"][:16]) == (
                200,
                1,
                "application/json",
            )
        assert fake.bodies == [b"vllm"]
        assert fake.headers[0]["authorization"] == "Bearer sk-1"
        await ask(pool, authorization="Bearer fg-r1/a1")
        assert "authorization" not in fake.headers[1]


async def test_keys_of_the_settings_are_sent_and_read_again(tmp_path: Path):
    path = tmp_path / "key"
    path.write_text("first\n")
    async with FakeBackend() as one, FakeBackend() as two:
        named = one.settings(kind="openai", models=["m1"], api_key="sk-one")
        filed = two.settings(kind="openai", models=["m2"], api_key_file=path)
        async with pool_of(named, filed, health_seconds=0.05) as pool:
            await ask(pool, "m1", authorization="Bearer of-the-agent")
            await ask(pool, "m2", authorization="Bearer of-the-agent")
            assert [one.headers[0]["authorization"], two.headers[0]["authorization"]] == [
                "Bearer sk-one",
                "Bearer first",
            ]
            path.write_text("second")
            await asyncio.sleep(0.2)
            await ask(pool, "m2")
            assert two.headers[1]["authorization"] == "Bearer second"


async def test_models_are_routed_by_name():
    async with fakes(3) as (policy, judge, other):
        policy.models = ["policy"]
        backends = [
            policy.settings(),
            judge.settings(kind="openai", models=["judge"]),
            other.settings(kind="openai"),
        ]
        async with pool_of(*backends) as pool:
            assert await asked_by(pool, "policy") == "0"
            assert await asked_by(pool, "judge") == "1"
            assert await asked_by(pool, "anything-else") == "2"
            assert await asked_by(pool, "") == "0"
            assert [model["id"] for model in await pool.models()] == ["policy", "judge"]


async def test_an_adapter_is_served_where_it_was_loaded_as_soon_as_it_is():
    async with fakes(2) as (one, two), pool_of(one.settings(), two.settings(), health_seconds=60) as pool:
        await until(lambda: all(state["models"] for state in pool.state()))
        two.models.append("policy-v2")
        assert {await asked_by(pool, "policy-v2") for _ in range(8)} == {"1"}
        assert two.asked.count("/v1/models") == 2


async def test_a_server_that_lists_its_models_to_agents_only_is_asked_as_one(caplog: pytest.LogCaptureFixture):
    async def guard(request: web.Request) -> web.StreamResponse | None:
        return None if request.headers.get("authorization") == "Bearer sk-vllm" else web.Response(status=401)

    async with FakeBackend(guard=guard) as fake:
        settings = GatewaySettings(backend_url=fake.url, health_seconds=0.1)
        async with Pool(settings) as pool:
            deadline = asyncio.get_running_loop().time() + 5
            assert not await pool.follows_policy("policy", deadline, "")
            assert not await pool.follows_policy("policy", deadline, "Bearer wrong")
            assert await pool.follows_policy("policy", deadline, "Bearer fg-r1/a1/sk-vllm")
            assert await pool.follows_policy("policy", deadline, ""), "what it said stands"
            fake.models.append("policy-v2")
            await asyncio.sleep(0.2)
            known = fake.asked.count("/v1/models")
            async with pool.open(asking(authorization="Bearer sk-vllm")) as exchange:
                assert exchange.adapter_version == 2
            await ask(pool, authorization="Bearer sk-vllm")
            assert fake.asked.count("/v1/models") <= known + 2, "not with every call"
    (warning,) = [text for text in caplog.messages if "does not say which models" in text]
    assert "status 401" in warning
    assert "sk-vllm" not in caplog.text


async def test_a_model_nobody_serves_is_404():
    async with FakeBackend() as fake, pool_of(fake.settings(kind="openai", models=["judge"])) as pool:
        error = await refused(pool, "gpt")
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "route",
    ["/collective_rpc", "/pause", "/v1/load_lora_adapter", f"{CHAT}/../../pause", "/update_weights?x=/v1/messages", ""],
)
async def test_other_routes_cannot_be_asked(route: str):
    async with FakeBackend() as fake, pool_of(fake.settings()) as pool:
        await until(lambda: "/v1/models" in fake.asked)
        known = len(fake.asked)
        assert (await refused(pool, route=route)).status == 404
        assert len(fake.asked) == known
        assert (await ask(pool, route=f"{CHAT}?x=1"))[0] == 200


async def test_a_pin_stays_on_one_replica_and_the_rest_is_spread():
    async with fakes(3) as servers, pool_of(*(fake.settings() for fake in servers)) as pool:
        homes = {pin: {await asked_by(pool, pin=pin) for _ in range(4)} for pin in map(str, range(20))}
        assert all(len(home) == 1 for home in homes.values())
        assert len(set.union(*homes.values())) == 3
        before = [fake.completions for fake in servers]
        await asyncio.gather(*(ask(pool) for _ in range(30)))
        spread = [fake.completions - count for fake, count in zip(servers, before, strict=True)]
        assert min(spread) >= 8


async def test_a_pin_whose_replica_is_full_goes_to_its_second_and_comes_back():
    async with fakes(3) as servers, pool_of(*(f.settings(max_concurrent_requests=1) for f in servers)) as pool:
        first = int(await asked_by(pool, pin="r"))
        async with pool.open(asking(pin="r")) as held:
            assert held.endpoint == servers[first].url
            seconds = {await asked_by(pool, pin="r") for _ in range(5)}
        assert len(seconds) == 1
        assert seconds != {str(first)}
        assert await asked_by(pool, pin="r") == str(first)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_another_replica_answers_for_one_that_is_away(status: int):
    async with fakes(2) as (bad, good), pool_of(bad.settings(), good.settings()) as pool:
        bad.answer = with_status(status)
        began = time.monotonic()
        # So many, that the chance is none that all are pinned to the good one.
        assert {await asked_by(pool, pin=str(pin)) for pin in range(40)} == {"1"}
        assert time.monotonic() - began < 3
        assert bad.completions >= 1


async def test_a_dead_and_a_breaking_replica_are_passed_over():
    async with fakes(3) as servers, pool_of(*(fake.settings() for fake in servers)) as pool:
        await servers[0].stop()
        servers[1].answer = breaks_at_once
        assert {await asked_by(pool, pin=str(pin)) for pin in range(10)} == {"2"}


async def test_what_the_model_says_is_not_asked_again():
    async with fakes(2) as servers, pool_of(*(fake.settings() for fake in servers)) as pool:
        for status in (400, 404, 429):
            for fake in servers:
                fake.answer = with_status(status)
            before = sum(fake.completions for fake in servers)
            assert (await ask(pool))[0] == status
            assert sum(fake.completions for fake in servers) == before + 1


async def test_redirects_are_not_followed():
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("/pause")

    async with FakeBackend(answer=elsewhere) as fake, pool_of(fake.settings()) as pool:
        assert (await ask(pool))[0] == 307
        assert "/pause" not in fake.asked


async def test_a_restart_is_waited_for():
    async with FakeBackend() as fake, pool_of(fake.settings(), health_seconds=0.1) as pool:
        await ask(pool)
        await fake.stop()
        waiting = [asyncio.create_task(ask(pool)) for _ in range(20)]
        await until(lambda: not pool.state()[0]["well"])
        assert await pool.health(1) == "ConnectionRefusedError"
        await fake.start()
        began = time.monotonic()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 20
        assert time.monotonic() - began < 2
        assert await pool.health(1) == ""


async def test_nobody_there_until_the_deadline_is_503():
    async with pool_of(BackendSettings(url="http://127.0.0.1:1")) as pool:
        began = time.monotonic()
        error = await refused(pool, seconds=0.5)
        assert (error.status, error.code, error.retriable) == (503, "backend_unavailable", True)
        assert 0.3 < time.monotonic() - began < 1.5


async def test_a_backend_still_at_it_at_the_deadline_is_504_and_stops():
    async with FakeBackend(answer=never) as fake, pool_of(fake.settings()) as pool:
        error = await refused(pool, seconds=0.3)
        assert (error.status, error.code) == (504, "backend_timeout")
        await until(lambda: fake.hung_up == 1)
        assert pool.state()[0]["in_flight"] == 0


async def test_a_request_that_kills_is_given_up():
    async with fakes(2) as servers, pool_of(*(fake.settings() for fake in servers), breaker_failures=1_000) as pool:
        for fake in servers:
            fake.answer = breaks_at_once
        error = await refused(pool)
        assert (error.status, error.code) == (502, "backend_broken")
        assert sum(fake.completions for fake in servers) == MAX_BROKEN_TRIES


async def test_an_external_provider_that_fails_is_left_alone_then_probed():
    bounds = {"breaker_failures": 3, "breaker_seconds": 0.2, "max_breaker_seconds": 0.2}
    async with FakeBackend(answer=with_status(503)) as fake, pool_of(fake.settings(kind="openai"), **bounds) as pool:
        waiting = [asyncio.create_task(ask(pool)) for _ in range(10)]
        await until(lambda: fake.completions >= 3)
        at_opening = fake.completions
        await asyncio.sleep(0.1)
        assert fake.completions <= at_opening + 10  # those that were under way when it opened
        probed = fake.completions
        await asyncio.sleep(0.5)
        assert probed < fake.completions <= probed + 3
        fake.answer = None
        assert {status for status, _ in await asyncio.gather(*waiting)} == {200}
        assert "/health" not in fake.asked


async def test_bounds_in_all_and_per_backend_hold_and_queues_have_an_end():
    async def slowly(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        return web.json_response({})

    async with fakes(2) as (small, large):
        backends = [small.settings(max_concurrent_requests=2), large.settings()]
        async with pool_of(*backends, max_concurrent_requests=6, max_queued_requests=10) as pool:
            small.answer = large.answer = slowly
            results = await asyncio.gather(*(ask(pool) for _ in range(30)), return_exceptions=True)
            errors = [result for result in results if isinstance(result, ApiError)]
            assert {(error.status, error.code) for error in errors} == {(429, "too_many_requests")}
            assert errors[0].headers() == [(b"retry-after", b"1")]
            assert len(results) - len(errors) == 16
            assert small.most_under_way == 2
            assert large.most_under_way <= 6
            assert [state["in_flight"] for state in pool.state()] == [0, 0]


async def test_a_full_line_of_one_model_does_not_refuse_another():
    async with fakes(2) as (busy, idle):
        backends = [
            busy.settings(kind="openai", models=["a"], max_concurrent_requests=1, max_queued_requests=1),
            idle.settings(kind="openai", models=["b"]),
        ]
        async with pool_of(*backends) as pool:
            busy.answer = never
            held = [asyncio.create_task(ask(pool, "a", seconds=1)) for _ in range(2)]
            await until(lambda: busy.under_way == 1)
            assert (await refused(pool, "a")).status == 429
            assert await asked_by(pool, "b") == "1"
            assert {type(error) for error in await asyncio.gather(*held, return_exceptions=True)} == {ApiError}


async def test_a_wait_for_room_ends_before_the_deadline():
    async with (
        FakeBackend(answer=never) as fake,
        pool_of(fake.settings(max_concurrent_requests=1), queue_seconds=0.2) as pool,
    ):
        held = asyncio.create_task(ask(pool))
        await until(lambda: fake.under_way == 1)
        error = await refused(pool)
        assert (error.status, error.code) == (503, "queue_timeout")
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)


async def test_an_agent_that_hangs_up_ends_the_generation_and_frees_its_place():
    started = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"data: x\n\n")
            started.set()
            await asyncio.sleep(0.01)

    async with FakeBackend(answer=endless) as fake, pool_of(fake.settings(max_concurrent_requests=1)) as pool:
        reading = asyncio.create_task(ask(pool))
        async with asyncio.timeout(5):
            await started.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: fake.under_way == 0)
        async with pool.open(asking()) as exchange:  # left in the middle, without an error
            async for _ in exchange.chunks():
                break
        await until(lambda: fake.under_way == 0)
        assert pool.state()[0]["in_flight"] == 0


async def test_seats_never_leak_whoever_hangs_up_when():
    rng = random.Random(7)

    async def sometimes(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(rng.uniform(0, 0.02))
        if rng.random() < 0.2:
            return web.Response(status=503)
        if rng.random() < 0.1:
            return await breaks_at_once(request)
        return web.json_response({"by": "x"})

    async def impatient(pool: Pool, seconds: float) -> None:
        asking = asyncio.create_task(ask(pool, pin=str(rng.random()), seconds=rng.uniform(0.01, 2)))
        await asyncio.wait({asking}, timeout=seconds)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async with fakes(2) as servers:
        backends = [fake.settings(max_concurrent_requests=3) for fake in servers]
        async with pool_of(*backends, max_concurrent_requests=5, max_queued_requests=400) as pool:
            for fake in servers:
                fake.answer = sometimes
            await asyncio.gather(*(impatient(pool, rng.uniform(0, 0.5)) for _ in range(400)))
            assert [state["in_flight"] for state in pool.state()] == [0, 0]
            assert max(fake.most_under_way for fake in servers) <= 4  # one may not know yet that it was hung up on
            for fake in servers:
                fake.answer = None
            assert {status for status, _ in await asyncio.gather(*(ask(pool) for _ in range(20)))} == {200}


async def test_an_answer_that_breaks_is_too_large_or_falls_silent():
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        await asyncio.sleep(0.05)
        return await breaks_at_once(request)

    async def large(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * 5_000)

    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        return await never(request)

    async with FakeBackend() as fake:
        async with pool_of(fake.settings(), max_answer_bytes=4_096, silence_seconds=0.2) as pool:
            for answer, status, code in (
                (half, 502, "backend_broken"),
                (large, 502, "backend_invalid"),
                (silent, 504, "backend_timeout"),
            ):
                fake.answer = answer
                error = await refused(pool)
                assert (error.status, error.code) == (status, code)
        assert fake.completions == 3


async def test_versions_bound_an_answer_that_has_none():
    async with FakeBackend(label="7") as fake, pool_of(fake.settings()) as pool:
        async with pool.open(asking()) as exchange:
            assert exchange.version_before == "7"
            fake.label = "8"
            assert [chunk async for chunk in exchange.chunks()]
            assert await exchange.version_after() == "8"
        fake.label = None  # a server without the route
        async with pool.open(asking()) as exchange:
            assert [chunk async for chunk in exchange.chunks()]
            assert await exchange.version_after() is None
        known = fake.asked.count("/weight_info")
        async with pool.open(asking()) as exchange:
            assert await exchange.version_after() is None
        assert fake.asked.count("/weight_info") == known


async def test_a_label_that_went_and_came_back_bounds_nothing():
    async with FakeBackend(label="7") as fake, pool_of(fake.settings()) as pool:

        async def another() -> str | None:
            async with pool.open(asking()) as exchange:
                assert [chunk async for chunk in exchange.chunks()]
                return await exchange.version_after()

        async with pool.open(asking()) as exchange:
            assert exchange.version_before == "7"
            fake.label = "8"
            assert await another() == "8"
            fake.label = "7"
            assert [chunk async for chunk in exchange.chunks()]
            assert await exchange.version_after() is None
        assert await another() == "7"


async def test_nobody_asks_for_versions_that_answers_have():
    async def versioned(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in (b'{"choices":[{"weight_', b"ver", b'sions":[]}]}'):
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    async with FakeBackend(answer=versioned) as fake, pool_of(fake.settings()) as pool:
        counts: list[int] = []
        for _ in range(4):
            async with pool.open(asking()) as exchange:
                assert [chunk async for chunk in exchange.chunks()]
                assert await exchange.version_after() is None
            counts.append(fake.asked.count("/weight_info"))
        assert counts[0] == counts[-1] <= 2, "by the first call, and by the health check"


async def test_one_question_for_the_version_serves_many_calls():
    async with FakeBackend() as fake, pool_of(fake.settings()) as pool:

        async def versions() -> tuple[str | None, str | None]:
            async with pool.open(asking()) as exchange:
                assert [chunk async for chunk in exchange.chunks()]
                return exchange.version_before, await exchange.version_after()

        assert set(await asyncio.gather(*(versions() for _ in range(100)))) == {("1", "1")}
        assert fake.asked.count("/weight_info") < 60


async def test_a_body_over_a_megabyte_goes_through():
    async with FakeBackend() as fake, pool_of(fake.settings()) as pool:
        assert (await ask(pool, body_for=lambda kind: b"x" * (3 << 20)))[0] == 200
        assert len(fake.bodies[0]) == 3 << 20


async def test_a_sick_replica_gets_nothing_until_it_is_well():
    async with fakes(2) as (sick, well), pool_of(sick.settings(), well.settings(), health_seconds=0.05) as pool:
        sick.health_status = 503
        await until(lambda: not pool.state()[0]["well"])
        assert {await asked_by(pool, pin=str(pin)) for pin in range(10)} == {"1"}
        assert await pool.health(1) == ""
        sick.health_status = 200
        await until(lambda: pool.state()[0]["well"])
        assert {await asked_by(pool, pin=str(pin)) for pin in range(20)} == {"0", "1"}


async def test_a_frozen_replica_counts_as_sick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fulgurite.producers.gateway.replica.CHECK_SECONDS", 0.1)
    async with fakes(2) as servers, pool_of(*(fake.settings() for fake in servers), health_seconds=0.05) as pool:
        frozen = servers[0]
        frozen.frozen = True
        await until(lambda: not pool.state()[0]["well"])
        assert {await asked_by(pool, pin=str(pin)) for pin in range(10)} == {"1"}
        frozen.frozen = False
        await until(lambda: pool.state()[0]["well"])


async def test_models_that_only_a_key_shows_are_shown_to_it():
    async def guarded(request: web.Request) -> web.StreamResponse | None:
        return None if request.headers.get("authorization") == "Bearer sk-1" else web.Response(status=401)

    async with FakeBackend(guard=guarded) as fake, Pool(GatewaySettings(backend_url=fake.url)) as pool:
        with pytest.raises(ApiError) as caught:
            await pool.models("Bearer fg-r/a")
        assert caught.value.status == 503
        assert [model["id"] for model in await pool.models("Bearer fg-r/a/sk-1")] == ["policy"]


async def test_listing_models_often_asks_backends_seldom():
    async with FakeBackend() as fake, pool_of(fake.settings(), health_seconds=60) as pool:
        for _ in range(20):
            assert [model["id"] for model in await pool.models()] == ["policy"]
        assert fake.asked.count("/v1/models") <= 3


async def test_an_unexpected_error_of_the_upkeep_comes_out(monkeypatch: pytest.MonkeyPatch):
    async def broken(self: Replica) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(Replica, "check", broken)
    with pytest.raises(ExceptionGroup) as caught:
        async with FakeBackend() as fake, pool_of(fake.settings()):
            await asyncio.sleep(5)
    assert caught.group_contains(ZeroDivisionError)


async def test_what_happened_is_in_the_metrics():
    async with fakes(2) as (bad, good), pool_of(bad.settings(), good.settings()) as pool:
        bad.answer = with_status(503)
        for pin in range(10):
            await ask(pool, pin=str(pin))
        text = generate_latest(pool.metrics.registry).decode()
        assert f'fulgurite_gateway_answers_total{{backend="{good.url}",status="2xx"}} 10.0' in text
        assert f'fulgurite_gateway_failed_tries_total{{backend="{bad.url}"}} {bad.completions}.0' in text
        assert "fulgurite_gateway_waiting_requests 0.0" in text
        assert "fulgurite_gateway_queue_seconds_count 10.0" in text


async def test_no_provider_is_asked_for_what_may_be_a_vllms_that_is_away(unused_tcp_port: int):
    policy = FakeBackend(name="policy", models=["base"], port=unused_tcp_port)
    async with FakeBackend(name="stranger") as stranger:
        backends = [policy.settings(), stranger.settings(kind="openai")]
        async with pool_of(*backends, health_seconds=0.05) as pool:
            error = await refused(pool, "base", seconds=0.5)
            assert (error.status, error.code) == (503, "backend_unavailable")
            waiting = asyncio.create_task(asked_by(pool, "base"))
            other = asyncio.create_task(asked_by(pool, "gpt"))
            await asyncio.sleep(0.3)
            async with policy:
                assert await waiting == "policy"
                assert await other == "stranger"
            error = await refused(pool, "base", seconds=0.5)  # it said so once: it is known
            assert (error.status, stranger.completions) == (503, 1)


@pytest.mark.parametrize("model", ["policy", "policy-v7"])
async def test_what_is_called_as_the_policy_goes_to_no_stranger(model: str):
    async with fakes(3) as (policy, stranger, named):
        policy.models, policy.answer = ["base"], with_status(404)
        backends = [policy.settings(), stranger.settings(kind="openai")]
        async with pool_of(*backends) as pool:
            assert (await ask(pool, model))[0] == 404
        async with pool_of(policy.settings(models=["base"]), stranger.settings(kind="openai")) as pool:
            assert (await refused(pool, model)).code == "model_not_found"
        async with pool_of(policy.settings(), named.settings(kind="openai", models=[model])) as pool:
            assert await asked_by(pool, model) == "2"
    assert stranger.completions == 0


async def test_a_vllm_that_lists_only_for_a_key_is_asked_with_the_agents():
    async def guard(request: web.Request) -> web.StreamResponse | None:
        keyed = request.headers.get("authorization") == "Bearer k"
        return None if keyed else web.json_response({}, status=401)

    async with fakes(2) as (policy, stranger):
        policy.models, policy.guard = ["base"], guard
        async with pool_of(policy.settings(forward_authorization=True), stranger.settings(kind="openai")) as pool:
            assert await asked_by(pool, "base", authorization="Bearer k") == "0"
            assert await asked_by(pool, "gpt") == "1"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("", CHAT),
        ("/v1", CHAT),
        ("/v1/paas/v4", "/v1/paas/v4/chat/completions"),
        ("/v1/beta/openai/", "/v1/beta/openai/chat/completions"),
    ],
)
async def test_a_providers_routes_follow_its_path(path: str, asked: str):
    async with FakeBackend() as fake, pool_of(BackendSettings(url=fake.url + path, kind="openai")) as pool:
        assert await asked_by(pool, "gpt") == "backend"
        assert fake.asked == [asked]

"""Keys, budgets, deadlines and several backends as an agent's own client sees them, through the whole gateway."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import openai
import pytest
from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import Response

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.keys import new_key
from fulgurite.producers.gateway.pool import Pool
from fulgurite.producers.gateway.token_route import DERENDER, GENERATE
from fulgurite.schemas.settings import ApiKeySettings, BackendSettings, GatewaySettings
from tests.producers.fake_backend import FakeBackend, never
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES, FakePublisher, ask, client, gateway, serving, well
from tests.producers.test_gateway_hostile import TOOLS, TokenServer, post


async def test_without_the_key_nobody_asks_and_with_it_the_token_carries_ids_too(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    publisher = FakePublisher()
    key, hashed = new_key("team-a")
    keys = [ApiKeySettings(name="team-a", hash=hashed)]
    async with FakePolicyServer(label="1") as backend, gateway(publisher, backend.url, api_keys=keys) as url:
        for wrong in ("secret-key", "fg-r7/a7", "fg-r7/a7/secret-key", new_key("team-a")[0]):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=wrong, max_retries=0) as agent:
                with pytest.raises(openai.AuthenticationError):
                    await agent.chat.completions.create(model="policy", messages=MESSAGES)
                with pytest.raises(openai.AuthenticationError):
                    await agent.models.list()
        assert not backend.requests
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=f"fg-r7/a7/{key}", max_retries=0) as agent:
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
            assert [model.id async for model in await agent.models.list()] == ["policy"]
    (span,) = publisher.spans
    assert (span.rollout_id, span.attempt_id) == ("r7", "a7")
    assert key not in caplog.text + span.model_dump_json()
    assert "2+2?" not in caplog.text


async def test_a_spent_budget_is_told_at_once_and_only_to_its_rollout():
    publisher = FakePublisher()
    async with (
        FakePolicyServer(label="1") as backend,
        gateway(publisher, backend.url, max_rollout_tokens=14) as url,
        client(url).with_options(max_retries=5) as agent,
        client(url, rollout="r2") as other,
    ):
        for _ in range(2):  # seven tokens each
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
        with pytest.raises(openai.RateLimitError) as caught:
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
        assert caught.value.code == "token_budget"
        assert len(backend.requests) == 2
        await other.chat.completions.create(model="policy", messages=MESSAGES)
    assert [span.rollout_id for span in publisher.spans] == ["r1", "r1", "r2"]


async def test_the_clients_own_timeout_ends_the_call_and_the_generation():
    async with FakeBackend(answer=never) as backend, gateway(FakePublisher(), backend.url) as url:
        began = time.monotonic()
        async with aiohttp.ClientSession() as session:
            body = {"model": "policy", "messages": MESSAGES}
            headers = {"x-request-timeout": "0.3"}
            async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
                assert answer.status == 504
                assert (await answer.json())["error"]["code"] == "backend_timeout"
        assert time.monotonic() - began < 3
        await until(lambda: backend.hung_up == 1)
        async with client(url, timeout=0.3) as agent:
            with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
                await agent.chat.completions.create(model="policy", messages=MESSAGES)
        await until(lambda: backend.hung_up == 2)


async def test_a_killed_replica_costs_no_call_and_a_provider_is_traced():
    publisher = FakePublisher()
    async with FakePolicyServer(label="1") as one, FakePolicyServer(label="1") as two, FakePolicyServer() as provider:
        backends = [
            BackendSettings(url=one.url),
            BackendSettings(url=two.url),
            BackendSettings(url=provider.url, kind="openai", models=["judge"]),
        ]
        settings = GatewaySettings(backends=backends, health_seconds=0.2)
        one.delay_seconds = two.delay_seconds = 0.01
        async with Pool(settings) as pool, serving(Gateway(settings, pool, publisher, well)) as url:

            async def rollout(number: int) -> None:
                async with client(url, rollout=f"r{number}") as agent:
                    for _ in range(10):
                        await agent.chat.completions.create(model="policy", messages=MESSAGES)

            running = [asyncio.create_task(rollout(number)) for number in range(12)]
            await until(lambda: len(publisher.spans) > 20)
            await one.stop()
            await until(lambda: len(publisher.spans) > 70)
            await one.start()
            await asyncio.gather(*running)
            answer: Any = await ask(url, extra_body={"model": "judge"})
            assert answer.choices[0].message.content == "answer 0"
            assert "return_token_ids" not in provider.requests[0]
            metrics = generate_latest(pool.metrics.registry).decode()
    policy, (judged,) = publisher.spans[:-1], publisher.spans[-1:]
    assert [span.status for span in policy] == ["ok"] * 120
    assert {span.endpoint for span in policy} == {one.url, two.url}
    assert not publisher.dead
    assert (judged.endpoint, judged.resource, judged.status) == (provider.url, "", "ok")
    assert f'fulgurite_gateway_answers_total{{backend="{provider.url}",status="2xx"}} 1.0' in metrics


class Generating(TokenServer):
    """Says what it sampled when the test lets it."""

    sampled: asyncio.Event

    def more_routes(self) -> list[tuple[str, str, Callable[[Request], Any]]]:
        self.sampled = asyncio.Event()
        found = super().more_routes()
        (generate,) = (handler for route, _, handler in found if route == GENERATE)

        async def wait(request: Request) -> Response:
            await self.sampled.wait()
            return await generate(request)

        return [(GENERATE, "POST", wait), *(route for route in found if route[0] != GENERATE)]


async def is_put_into_words(backend: Generating, publisher: FakePublisher, url: str, fail: Callable[[], None]) -> None:
    """While the only seat is taken, and others wait in line for longer than it could."""
    rollout = {"model": "policy", "messages": MESSAGES, "tools": TOOLS}
    sampling = asyncio.create_task(post(url, "/v1/chat/completions", rollout))
    await until(lambda: GENERATE in backend.log)
    backend.hold = ("/v1/chat/completions", 1)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as agent:
        waiting = [
            asyncio.create_task(agent.chat.completions.create(model="policy", messages=MESSAGES)) for _ in range(2)
        ]
        await asyncio.sleep(0.1)
        fail()
        backend.sampled.set()
        assert (await sampling)[0] == 200
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert [span.status for span in publisher.spans if span.rollout_id] == ["ok"]
    assert not publisher.dead


BOUNDS: dict[str, Any] = {"max_concurrent_requests": 1, "max_queued_requests": 3, "queue_seconds": 0.5}


@pytest.mark.parametrize("times", [1, 2])
async def test_what_was_sampled_waits_in_no_line_either_after_a_failure(times: int):
    publisher = FakePublisher()
    async with Generating(label="1") as backend, gateway(publisher, backend.url, **BOUNDS) as url:
        left = times

        def fail() -> Response | None:
            nonlocal left
            left -= 1
            return Response(status_code=503) if left >= 0 else None

        await is_put_into_words(backend, publisher, url, lambda: backend.faults.update({DERENDER: fail}))
    assert left < 0


async def test_what_was_sampled_waits_in_no_line_for_a_backend_that_is_left_alone_for_a_moment():
    publisher = FakePublisher()
    breaker = {"breaker_failures": 1, "breaker_seconds": 0.2, "health_seconds": 60}
    async with Generating(label="1") as backend, gateway(publisher, backend.url, **BOUNDS, **breaker) as url:
        failed: list[bool] = []

        def fail() -> Response | None:
            failed.append(True)
            return Response(status_code=503) if len(failed) == 1 else None

        await is_put_into_words(backend, publisher, url, lambda: backend.faults.update({DERENDER: fail}))
    assert len(failed) > 1


async def test_what_was_sampled_is_put_into_words_before_anybody_in_line_is_asked():
    """It would be sampled again, where the line is too long."""
    publisher = FakePublisher()
    bounds = {"max_concurrent_requests": 1, "max_queued_requests": 1, "queue_seconds": 0.5}
    async with Generating(label="1") as backend, gateway(publisher, backend.url, **bounds) as url:
        rollout = {"model": "policy", "messages": MESSAGES, "tools": TOOLS}
        sampling = asyncio.create_task(post(url, "/v1/chat/completions", rollout))
        await until(lambda: GENERATE in backend.log)
        backend.hold = ("/v1/chat/completions", 1)  # takes the seat, and keeps it
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as agent:
            waiting = [
                asyncio.create_task(agent.chat.completions.create(model="policy", messages=MESSAGES)) for _ in range(2)
            ]
            await asyncio.sleep(0.1)
            backend.sampled.set()
            await backend.held.wait()
            assert (await sampling)[0] == 200
            for task in waiting:
                task.cancel()
            found = await asyncio.gather(*waiting, return_exceptions=True)
    assert DERENDER in backend.log
    assert sum(isinstance(error, openai.RateLimitError) for error in found) == 1, "the line was full"
    assert [span.status for span in publisher.spans if span.rollout_id] == ["ok"]
    assert not publisher.dead

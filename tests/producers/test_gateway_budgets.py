"""Token budgets and deadlines of calls."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.budgets import Budgets, allowed_seconds
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.pool import Pool
from fulgurite.schemas.settings import GatewaySettings
from tests.producers.fake_backend import FakeBackend, with_status
from tests.producers.fake_policy_server import FakePolicyServer
from tests.producers.gateway_support import MESSAGES, FakePublisher, serving, well
from tests.producers.test_gateway_hostile import post


def refused(budgets: Budgets, rollout_id: str) -> bool:
    try:
        budgets.check(rollout_id)
    except ApiError:
        return True
    return False


@given(st.lists(st.tuples(st.sampled_from(["r1", "r2", "r3"]), st.integers(0, 50)), max_size=60))
def test_a_rollout_is_refused_exactly_when_it_has_used_its_tokens(calls: list[tuple[str, int]]):
    budgets = Budgets(100)
    used: dict[str, int] = {}
    for rollout_id, tokens in calls:
        assert refused(budgets, rollout_id) == (used.get(rollout_id, 0) >= 100)
        budgets.spent(rollout_id, tokens)
        used[rollout_id] = used.get(rollout_id, 0) + tokens


def test_a_spent_budget_is_429_that_clients_do_not_retry():
    budgets = Budgets(10)
    budgets.spent("r1", 12)
    with pytest.raises(ApiError, match=r"r1 has used 12 tokens; .*gateway\.max_rollout_tokens is 10") as caught:
        budgets.check("r1")
    assert (caught.value.status, caught.value.code, caught.value.retriable) == (429, "token_budget", False)
    assert caught.value.headers() == [(b"x-should-retry", b"false")]


def test_no_bound_and_no_rollout_are_never_refused():
    for budgets, rollout_id in ((Budgets(0), "r1"), (Budgets(1), "")):
        budgets.spent(rollout_id, 1_000_000)
        budgets.check(rollout_id)


def test_memory_is_bounded_and_the_silent_are_forgotten_first():
    budgets = Budgets(10, max_rollouts=3)
    for rollout_id in ("r1", "r2", "r3", "r1", "r4"):
        budgets.spent(rollout_id, 10)
    assert [refused(budgets, rollout_id) for rollout_id in ("r1", "r2", "r3", "r4")] == [True, False, True, True]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 120.0),
        ({"x-request-timeout": "5"}, 5.0),
        ({"x-request-timeout": "0.5"}, 0.5),
        ({"x-request-timeout": "900"}, 120.0),
        ({"x-request-timeout": "1e-12"}, 0.001),
        ({"x-stainless-read-timeout": "30.0"}, 30.0),
        ({"x-stainless-read-timeout": "600", "x-stainless-timeout": "20"}, 20.0),
        ({"x-stainless-read-timeout": "NOT_GIVEN"}, 120.0),
        ({"x-stainless-read-timeout": "5", "x-request-timeout": "7"}, 5.0),
    ],
)
def test_an_agent_may_ask_for_less_time(headers: dict[str, str], seconds: float):
    assert allowed_seconds(headers, 120.0) == seconds


@pytest.mark.parametrize("said", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(said: str):
    with pytest.raises(ApiError, match="x-request-timeout must be seconds") as caught:
        allowed_seconds({"x-request-timeout": said}, 120.0)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("route", "body", "tokens"),
    [
        ("chat/completions", {"messages": MESSAGES, "n": 4}, 4 + 4 * 3),
        ("completions", {"prompt": ["a", "b"], "n": 3}, 2 * 4 + 6 * 3),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_with_many_answers_is_counted_once(route: str, body: Any, tokens: int, stream: bool):
    async with FakePolicyServer(label="1") as backend:
        settings = GatewaySettings(backend_url=backend.url)
        async with (
            Pool(settings) as pool,
            serving(Gateway(settings, pool, FakePublisher(), well)) as url,
            aiohttp.ClientSession() as agent,
        ):
            asked = {"model": "policy", "stream": stream} | body
            async with agent.post(f"{url}/rollout/r1/attempt/a1/v1/{route}", json=asked) as answer:
                await answer.read()
            assert pool.metrics.registry.get_sample_value("fulgurite_gateway_spent_tokens_total") == tokens


USAGE = {"prompt_tokens": 5, "completion_tokens": 50}


def provider_stream(provider: FakeBackend, *, knows: bool = True) -> Any:
    """A stream of a provider, which says its usage where it is asked to, or refuses to be asked."""

    async def answer(request: web.Request) -> web.StreamResponse:
        asked = json.loads(provider.bodies[-1])
        options = asked.get("stream_options")
        if options and not knows:
            return web.json_response({"error": {"message": "stream_options?"}}, status=400)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        choice = {"index": 0, "delta": {"content": "a"}, "text": "a", "finish_reason": "stop"}
        events: list[dict[str, Any]] = [{"id": "x", "choices": [choice], "odd": 1.50}]
        if (options or {}).get("include_usage"):
            events.append({"id": "x", "choices": [], "usage": USAGE})
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    return answer


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
async def test_streams_of_providers_are_of_the_budget_and_pass_as_they_came(route: str):
    publisher = FakePublisher()
    asked = {"model": "m", "messages": MESSAGES, "prompt": "x", "stream": True, "stream_options": {"other": 1}}
    async with FakeBackend(models=[]) as provider:
        provider.answer = provider_stream(provider)
        settings = GatewaySettings(backends=[provider.settings(kind="openai")], max_rollout_tokens=60)
        async with Pool(settings) as pool, serving(Gateway(settings, pool, publisher, well)) as url:
            _, body = await post(url, route, asked)
            assert body.count(b"data:") == 2
            assert b'"odd": 1.5}' in body  # byte for byte
            _, told = await post(url, route, asked | {"stream_options": {"include_usage": True}})
            assert b'"completion_tokens": 50' in told
            assert (await post(url, route, asked))[0] == 429
    assert json.loads(provider.bodies[0])["stream_options"] == {"other": 1, "include_usage": True}
    assert [(span.input_tokens, span.output_tokens) for span in publisher.spans] == [(5, 50)] * 2


async def test_a_provider_that_refuses_to_say_its_usage_is_asked_without():
    publisher = FakePublisher()
    asked = {"model": "m", "messages": MESSAGES, "stream": True}
    async with FakeBackend(models=[]) as provider:
        provider.answer = provider_stream(provider, knows=False)
        settings = GatewaySettings(backends=[provider.settings(kind="openai")])
        async with Pool(settings) as pool, serving(Gateway(settings, pool, publisher, well)) as url:
            status, body = await post(url, "/v1/chat/completions", asked)
            assert status == 200
            assert body.endswith(b"data: [DONE]\n\n")
            assert [b"stream_options" in body for body in provider.bodies] == [True, False]
            provider.answer = with_status(400)
            assert (await post(url, "/v1/chat/completions", asked))[0] == 400
            assert provider.completions == 4
            assert (await post(url, "/v1/chat/completions", asked | {"stream": False}))[0] == 400
            assert provider.completions == 5
    assert [span.status for span in publisher.spans] == ["ok", "error", "error"]

"""A stop of the gateway: what does not end within the grace is recorded with what came of it, and its agent is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from fulgurite.producers.gateway.app import Gateway
from fulgurite.producers.gateway.pool import Pool
from fulgurite.schemas.settings import GatewaySettings
from tests.producers.fake_policy_server import FakePolicyServer, until
from tests.producers.gateway_support import MESSAGES, FakePublisher, serving, well

ATTEMPT = "/rollout/r1/attempt/a1"
CALL: dict[str, Any] = {"model": "policy", "messages": MESSAGES}


async def ended(publisher: FakePublisher, body: dict[str, Any], route: str, **server: Any) -> tuple[int, bytes]:
    """(status, body) that the agent of a call gets which is under way when the gateway stops."""
    got = bytearray()

    async def agent(url: str) -> int:
        async with aiohttp.ClientSession() as session, session.post(f"{url}{ATTEMPT}{route}", json=body) as answer:
            async for part in answer.content.iter_any():
                got.extend(part)
            return answer.status

    async with FakePolicyServer(weights=7, label="1", **server) as backend:
        settings = GatewaySettings(backend_url=backend.url)
        async with Pool(settings) as pool:
            async with serving(Gateway(settings, pool, publisher, well), grace_seconds=1) as url:
                asking = asyncio.create_task(agent(url))
                await until(lambda: got.count(b"data:") >= 2 if body.get("stream") else backend.requests)
            assert publisher.spans, "the server was gone before the call was recorded"
            async with asyncio.timeout(5):
                status = await asking
            assert pool.state()[0]["in_flight"] == 0
    return status, bytes(got)


async def test_a_stream_that_does_not_end_in_time_is_recorded_and_told():
    publisher = FakePublisher()
    asked = CALL | {"stream": True}
    status, body = await ended(publisher, asked, "/v1/chat/completions", reply_tokens=30, event_seconds=0.3)
    assert status == 200
    assert b"[DONE]" not in body
    assert json.loads(body.strip().rpartition(b"data: ")[2])["error"]["code"] == "interrupted"
    (span,) = publisher.spans
    assert (span.status, span.finish_reason, span.attributes["error.type"]) == ("error", "", "interrupted")
    assert 0 < len(span.response_token_ids) == len(span.logprobs) < 30
    assert not publisher.dead


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
async def test_a_call_that_does_not_end_in_time_is_told_in_its_protocols_shape(route: str):
    publisher = FakePublisher()
    status, body = await ended(publisher, CALL | {"max_tokens": 5}, route, delay_seconds=30.0)
    answer = json.loads(body)
    assert status == 503
    assert answer["error"]["code"] == "interrupted"
    assert (answer.get("type") == "error") == (route == "/v1/messages")
    (span,) = publisher.spans
    assert (span.status, span.attributes["error.type"]) == ("error", "interrupted")


async def test_a_broker_that_is_away_does_not_keep_a_stop_waiting():
    publisher = FakePublisher(acknowledges=False)
    asked = CALL | {"stream": True}
    async with asyncio.timeout(8):
        _, body = await ended(publisher, asked, "/v1/chat/completions", reply_tokens=30, event_seconds=0.3)
    assert b"interrupted" in body or b"broker_unavailable" in body

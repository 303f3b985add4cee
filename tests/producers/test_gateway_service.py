"""The gateway's process against the real broker: what an agent was answered is on the log, also after kill -9."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from aiokafka import AIOKafkaConsumer

from fulgurite.producers import publisher as publisher_module
from fulgurite.producers.gateway import broker_problem, serve
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.ids import attempt_trace_id
from fulgurite.schemas.settings import GatewaySettings, KafkaSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import SPANS
from tests.producers.fake_policy_server import FakePolicyServer, until

MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def configured(kafka: KafkaSettings, backend: FakePolicyServer, **values: Any) -> Settings:
    return Settings(kafka=kafka, gateway=GatewaySettings(port=free_port(), backend_url=backend.url, **values))


async def spans(kafka: KafkaSettings) -> list[Span]:
    """All spans on the topic now."""
    consumer = AIOKafkaConsumer(kafka.topic(SPANS), **connection_options(kafka), auto_offset_reset="earliest")
    await consumer.start()
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        found: list[Span] = []
        async with asyncio.timeout(20):
            while len(found) < sum(ends.values()):
                found.append(decode(Span, (await consumer.getone()).value))
        return found
    finally:
        await consumer.stop()


async def healthy(url: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def health(url: str) -> dict[str, str]:
    """What it says, as soon as it listens."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(5):
        while True:
            try:
                async with session.get(f"{url}/health") as response:
                    return await response.json()
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)


async def ask(agent: openai.AsyncOpenAI) -> str | None:
    answer = await agent.chat.completions.create(model="policy", messages=MESSAGES)
    return answer.choices[0].message.content


async def ask_streamed(agent: openai.AsyncOpenAI) -> str:
    """The text, once the stream came to its end. Raises httpx.HTTPError where it broke off."""
    stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_what_the_backend_sampled_is_on_the_topic(kafka_settings: KafkaSettings):
    stop = asyncio.Event()
    async with FakePolicyServer(weights=7, label="17") as backend:
        settings = configured(kafka_settings, backend)
        url = f"http://127.0.0.1:{settings.gateway.port}"
        serving = asyncio.create_task(serve(settings, stop))
        await healthy(url)
        async with openai.AsyncOpenAI(base_url=f"{url}/rollout/r1/attempt/a1/v1", api_key="none") as agent:
            assert await ask(agent) == "answer 0"
            (first,) = await spans(kafka_settings)  # it is there as soon as the answer is
            await asyncio.gather(*(ask_streamed(agent) for _ in range(20)))
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as outside:
            await ask(outside)
        found = await spans(kafka_settings)
        stop.set()
        async with asyncio.timeout(5):
            await serving
    assert (first.rollout_id, first.attempt_id, first.trace_id) == ("r1", "a1", attempt_trace_id("r1", "a1"))
    assert (first.prompt_token_ids, first.response_token_ids) == ([1, 2, 3, 4], [7, 7, 7])
    assert first.logprobs == [-0.125, -0.25, -0.375]
    assert first.weight_versions == [VersionSpan(version=17, start=0, end=3)]
    assert len({span.span_id for span in found}) == 22
    assert len({span.sequence_id for span in found if span.rollout_id}) == 21
    assert [span.attempt_id for span in found if not span.rollout_id] == [""]


@pytest.mark.parametrize("unrecorded", [False, True])
async def test_without_a_broker_at_the_start_calls_are_answered_and_a_stop_is_prompt(unrecorded: bool):
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    assert await broker_problem(kafka)
    stop = asyncio.Event()
    async with FakePolicyServer(label="1") as backend:
        settings = configured(kafka, backend, publish_seconds=0.3, answer_unrecorded=unrecorded)
        url = f"http://127.0.0.1:{settings.gateway.port}"
        serving = asyncio.create_task(serve(settings, stop))
        report = await health(url)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as agent:
            if unrecorded:
                assert await ask(agent) == "answer 0"
            else:
                with pytest.raises(openai.InternalServerError) as refused:
                    await ask(agent)
                assert (refused.value.status_code, refused.value.code) == (503, "broker_unavailable")
        assert (report["status"], report["backend"]) == ("unhealthy", "ok")
        assert report["broker"] != "ok"
        stop.set()
        async with asyncio.timeout(5):
            await serving


async def test_a_broker_that_comes_later_gets_the_span(kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch):
    """The call waits for it."""
    connect = publisher_module.connect

    async def later(*args: Any, **values: Any) -> Any:
        await asyncio.sleep(1)
        return await connect(*args, **values)

    monkeypatch.setattr(publisher_module, "connect", later)
    stop = asyncio.Event()
    async with FakePolicyServer(label="1") as backend:
        settings = configured(kafka_settings, backend)
        url = f"http://127.0.0.1:{settings.gateway.port}"
        serving = asyncio.create_task(serve(settings, stop))
        await health(url)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as agent:
            began = asyncio.get_running_loop().time()
            assert await ask(agent) == "answer 0"
            assert asyncio.get_running_loop().time() - began > 0.3
        assert len(await spans(kafka_settings)) == 1
        stop.set()
        await serving


async def test_brokers_that_refuse_us_end_the_gateway(monkeypatch: pytest.MonkeyPatch):
    async def refused(*_: Any, **__: Any) -> Any:
        raise SettingsError("no such user")

    monkeypatch.setattr(publisher_module, "connect", refused)
    async with FakePolicyServer(label="1") as backend, asyncio.timeout(5):
        with pytest.raises(SettingsError, match="no such user"):
            await serve(configured(KafkaSettings(), backend), asyncio.Event())


PROCESS = """
import json, sys
from fulgurite.producers.gateway import main
from fulgurite.schemas.settings import Settings
sys.exit(main(Settings.model_validate(json.loads(sys.argv[1]))))
"""


@pytest.mark.chaos
@pytest.mark.slow
async def test_kill_9_loses_no_answered_call(kafka_settings: KafkaSettings):
    async with FakePolicyServer(label="1") as backend:
        settings = configured(kafka_settings, backend)
        url = f"http://127.0.0.1:{settings.gateway.port}"
        command = [sys.executable, "-c", PROCESS, settings.model_dump_json(include={"kafka", "gateway"})]
        answered: list[str] = []

        async def agent(number: int) -> None:
            """Every other one streams: its call counts once it saw the end."""
            base = f"{url}/rollout/r{number}/attempt/a1/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
                while True:
                    try:
                        if number % 2:
                            assert await ask_streamed(client) == "answer 0"
                        else:
                            await ask(client)
                    except (openai.APIConnectionError, httpx.HTTPError):
                        return
                    answered.append(f"r{number}")

        killed = await asyncio.create_subprocess_exec(*command)
        await healthy(url)
        agents = [asyncio.create_task(agent(number)) for number in range(8)]
        await until(lambda: len(answered) > 100)
        killed.send_signal(signal.SIGKILL)
        await killed.wait()
        await asyncio.gather(*agents)

        again = await asyncio.create_subprocess_exec(*command)
        await healthy(url)
        again.terminate()
        assert await asyncio.wait_for(again.wait(), 10) == 0
    recorded = [span.rollout_id for span in await spans(kafka_settings)]
    for rollout in set(answered):
        missing = answered.count(rollout) - recorded.count(rollout)
        assert missing <= 0, f"{missing} answered calls of {rollout} are not on the log"
    assert len(recorded) - len(answered) <= 8, "at most one call an agent was recorded and not answered"

"""Prompt templates as agents get them: the newest, the one a rollout is pinned to, or an error that says why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import time

import pytest
from aiokafka import AIOKafkaProducer

from fulgurite.producers.outbox import Outbox
from fulgurite.producers.prompts import CANDIDATE_OF, NoTemplate, PromptTemplate, PromptTemplates, parse_pin, pin_of
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.rollout import RolloutContext
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.coordinator import Attempt, AttemptedRollout
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.resources import ResourceVersion, prompt_version
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import RESOURCES
from tests.consumers.poison import poison


@asynccontextmanager
async def following(kafka: KafkaSettings) -> AsyncGenerator[PromptTemplates]:
    prompts = PromptTemplates(kafka)
    try:
        yield prompts
    finally:
        await prompts.close()


async def publish(kafka: KafkaSettings, *versions: ResourceVersion) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for version in versions:
            await producer.send_and_wait(kafka.topic(RESOURCES), encode(version), encode_key(version.resource))
    finally:
        await producer.stop()


async def test_the_newest_unless_pinned(kafka_settings: KafkaSettings) -> None:
    candidate = prompt_version("support.c1", 5, "candidate", metadata={CANDIDATE_OF: "support"})
    weights = ResourceVersion(resource="policy", version=1, uri="file:///x", sha256="0" * 64)
    await publish(kafka_settings, prompt_version("support", 1, "old"), weights, prompt_version("support", 2, "new"))
    await publish(kafka_settings, candidate, prompt_version("other", 1, "other"))
    async with following(kafka_settings) as prompts:
        assert await prompts.get("support") == PromptTemplate("support", 2, "new")
        pinned = await prompts.get("support", pin_of("support.c1", 5))
        assert (pinned.text, pinned.pin) == ("candidate", "support.c1@5")
        assert (await prompts.get("other", pin_of("support.c1", 5))).text == "other"
        assert (await prompts.get("support", "of-something-else")).text == "new"
        with pytest.raises(NoTemplate, match=r"no prompt template policy; there are: other, support, support\.c1"):
            await prompts.get("policy")
        await poison(kafka_settings, RESOURCES, encode(prompt_version("support", 3, "nobody can decode it")))
        assert (await prompts.get("support")).text == "new"
        # Published after the reader was there, asked for at once: found, whatever its lag.
        for version in range(6, 9):
            await publish(kafka_settings, candidate.model_copy(update={"version": version, "content": str(version)}))
            assert (await prompts.get("support", f"support.c1@{version}")).text == str(version)
        with pytest.raises(NoTemplate, match=r"pinned to support\.c1@5; what there is is 8"):
            await prompts.get("support", "support.c1@5")
        with pytest.raises(NoTemplate, match=r"pinned to gone@1, which is not on"):
            await prompts.get("support", "gone@1")
        found = await asyncio.gather(*(prompts.get("support") for _ in range(20)))
        assert {template.text for template in found} == {"new"}


async def test_an_agent_gets_it_and_its_root_span_says_which(kafka_settings: KafkaSettings) -> None:
    await publish(kafka_settings, prompt_version("support", 3, "Answer {question}"))
    attempt = Attempt(rollout_id="r1", attempt_id="a1", sequence_id=1, status="preparing", start_time=time())
    attempted = AttemptedRollout(rollout_id="r1", status="preparing", start_time=time(), attempt=attempt)
    async with following(kafka_settings) as prompts, Publisher(kafka_settings) as publisher:
        outbox = Outbox(publisher, kafka_settings.topic, 10_000)
        rollout = RolloutContext(attempted, gateway_url="http://g", agent="solver", outbox=outbox, prompts=prompts)
        with rollout.active("task") as root:
            template = await asyncio.to_thread(rollout.prompt_template_sync, "support")
            assert template == await rollout.prompt_template("support")
        await outbox.flush()
        outbox.close()
        unattended = RolloutContext(attempted, gateway_url="http://g", agent="solver", outbox=outbox)
        with pytest.raises(FulguriteError, match="does not run under a runner"):
            await unattended.prompt_template("support")
    assert template.render(question="1+1?") == "Answer 1+1?"
    assert root.attributes["fulgurite.prompt_template.support"] == "support@3"


def test_pins() -> None:
    assert parse_pin(pin_of("a@b", 3)) == ("a@b", 3)
    assert parse_pin("res-1") is None
    assert parse_pin("res@01") is None

"""The translator: rewards out of spans, and their delivery through the real broker, also across crashes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from fulgurite.consumers.otlp.batches import otlp
from fulgurite.consumers.otlp.spans import decode
from fulgurite.consumers.otlp.wire import Malformed
from fulgurite.consumers.translator.rewards import TELL_TALES, Refused, rewards_of
from fulgurite.consumers.translator.service import serve, spans_of
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas.codec import decode as decode_event
from fulgurite.schemas.dead_letters import HEADER_LINE, HEADER_MESSAGE, HEADER_REASON
from fulgurite.schemas.redaction import KeyRule, RedactionSettings, ValueRule
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import DEAD_LETTERS, OTLP_SPANS, REWARDS, Topic
from tests.consumers.otlp_encoding import SPAN, START, event, record, span
from tests.consumers.poison import plain_builder, send_poison
from tests.producers.reading import read_topic

ROLLOUT = {"agentlightning.rollout_id": "r", "agentlightning.attempt_id": "a"}
AGL = {"agentlightning.reward.0.name": "correct", "agentlightning.reward.0.value": 0.5}


def rewards(value: bytes) -> list[Reward | Refused]:
    assert any(name in value for name in TELL_TALES)
    return [reward for one in decode(value) for reward in rewards_of(one)]


def only(value: bytes) -> Reward:
    (found,) = rewards(value)
    assert isinstance(found, Reward)
    return found


def test_a_reward_span_of_agent_lightning() -> None:
    more = {"agentlightning.reward.1.name": "short", "agentlightning.reward.1.value": 1}
    found = only(record(span({**AGL, **more}), resource=ROLLOUT))
    assert (found.rollout_id, found.attempt_id, found.span_id) == ("r", "a", "")
    assert (found.name, found.value, found.dimensions) == ("reward", 0.5, {"correct": 0.5, "short": 1.0})
    assert found.time_ns == START + 1_000
    assert only(record(span(AGL), resource=ROLLOUT)).dimensions == {}


def test_a_link_to_a_span_is_followed_and_another_one_kept() -> None:
    link = {"agentlightning.link.0.key_match": "span_id", "agentlightning.link.0.value_match": "ab" * 8}
    assert only(record(span({**AGL, **link}), resource=ROLLOUT)).span_id == "ab" * 8
    link["agentlightning.link.0.key_match"] = "gen_ai.response.id"
    found = only(record(span({**AGL, **link}), resource=ROLLOUT))
    assert (found.span_id, found.metadata) == ("", {"gen_ai.response.id": "ab" * 8})


@pytest.mark.parametrize("name", ["agentops.task.output", "agentops.entity.output"])
def test_older_forms(name: str) -> None:
    assert only(record(span({name: '{"type": "reward", "value": 2}'}), resource=ROLLOUT)).value == 2
    assert only(record(span({name: {"type": "reward", "value": 0.5}}), resource=ROLLOUT)).value == 0.5
    assert rewards(record(span({name: '{"type": "reward", "value": null}'}), resource=ROLLOUT)) == []
    assert rewards(record(span({name: "no JSON, a reward"}), resource=ROLLOUT)) == []
    assert only(record(span({"reward": 1.0}, name="agentlightning.annotation"), resource=ROLLOUT)).value == 1
    assert rewards(record(span({"reward": 1.0}, name="other"), resource=ROLLOUT)) == []


def test_a_broken_span_of_a_record_takes_nobody_elses_reward_with_it() -> None:
    good, broken = span(AGL), span(more=b"\x4a\x7f")
    value = record(good, broken, span(AGL, span_id=b"\x01" * 8), resource=ROLLOUT)
    with pytest.raises(Malformed):
        decode(value)
    found = [reward for one in spans_of(value) for reward in rewards_of(one)]
    assert [reward.value for reward in found if isinstance(reward, Reward)] == [0.5, 0.5]


def test_evaluations_of_a_span() -> None:
    good = {"gen_ai.evaluation.name": "relevance", "gen_ai.evaluation.score.value": 0.75}
    label = {"gen_ai.evaluation.name": "label only", "gen_ai.evaluation.score.label": "pass"}
    whole = {
        "gen_ai.evaluation.name": "reward",
        "gen_ai.evaluation.score.value": 1,
        "gen_ai.evaluation.explanation": "!",
    }
    events = [event("gen_ai.evaluation.result", values, 7) for values in (good, label, whole)]
    first, second = rewards(record(span(ROLLOUT, events=[event("other", {}), *events])))
    assert isinstance(first, Reward)
    assert isinstance(second, Reward)
    assert (first.name, first.value, first.span_id, first.time_ns) == ("relevance", 0.75, SPAN.hex(), 7)
    assert (second.name, second.value, second.span_id, second.metadata) == ("reward", 1, "", {"explanation": "!"})
    assert first.reward_id != second.reward_id


def test_what_becomes_metadata_follows_the_rules_for_the_attribute_it_was() -> None:
    values = {"score.value": 1, "explanation": "SECRET", "score.label": "pass"}
    judged = event("gen_ai.evaluation.result", {f"gen_ai.evaluation.{name}": value for name, value in values.items()})
    keys = [KeyRule(name="*.explanation", action="drop"), KeyRule(name="*.score.*", action="mask")]
    (one,) = decode(record(span(ROLLOUT, events=[judged])))
    (found,) = rewards_of(one, Redactor(RedactionSettings(keys=keys)))
    assert isinstance(found, Reward)
    assert (found.value, found.metadata) == (1, {"score.label": "[redacted]"})


def test_the_same_span_has_the_same_ids_and_another_one_has_others() -> None:
    value = record(span(AGL), resource=ROLLOUT)
    assert only(value).reward_id == only(value).reward_id
    assert only(value).reward_id != only(record(span(AGL, span_id=b"\xff" * 8), resource=ROLLOUT)).reward_id


def test_nobody_is_rewarded_without_a_rollout() -> None:
    assert rewards(record(span(AGL))) == []


@pytest.mark.parametrize("value", ["many", float("nan"), float("inf"), [1.0], "1e999", "1_0", "١", "nan", "0x1"])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    (found,) = rewards(record(span({"agentlightning.reward.0.value": value}), resource=ROLLOUT))
    assert isinstance(found, Refused)
    assert "value" in found.message


@pytest.mark.parametrize(("text", "value"), [("1", 1), (" -.5\n", -0.5), ("+1.E2", 100)])
def test_a_text_of_a_number_counts(text: str, value: float) -> None:
    assert only(record(span({"agentlightning.reward.0.value": text}), resource=ROLLOUT)).value == value


async def send(kafka: KafkaSettings, *values: bytes) -> None:
    async with AIOKafkaProducer(**connection_options(kafka)) as producer:
        for value in values:
            await producer.send_and_wait(kafka.topic(OTLP_SPANS), value=value, partition=0)


async def read(kafka: KafkaSettings, topic: Topic, count: int) -> list[bytes]:
    """All values of the topic, at least `count`."""
    async with AIOKafkaConsumer(
        kafka.topic(topic), **connection_options(kafka), auto_offset_reset="earliest", group_id=None
    ) as consumer:
        found: list[bytes] = []
        async with asyncio.timeout(30):
            while len(found) < count:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += [record.value for record in records if record.value is not None]
        return found


@contextlib.asynccontextmanager
async def translating(settings: Settings) -> AsyncGenerator[None]:
    stop = asyncio.Event()
    running = asyncio.create_task(serve(settings, stop))
    try:
        yield
    finally:
        stop.set()
        await running


def mine(prefix: str, number: int) -> bytes:
    return record(span(AGL), resource={"fulgurite.rollout_id": f"{prefix}-{number}"})


def from_test(prefix: str, values: list[bytes]) -> list[Reward]:
    """The topic otlp_spans has no prefix: other tests' records may lie in it."""
    found = [decode_event(Reward, value) for value in values]
    return [reward for reward in found if reward.rollout_id.startswith(prefix)]


async def test_rewards_reach_their_topic_and_what_is_none_the_dead_letters(kafka_settings: KafkaSettings) -> None:
    prefix = kafka_settings.topic_prefix.strip(".")
    score = {"gen_ai.evaluation.score.value": "1_0"}
    bad = record(
        span(AGL, name="good"),
        span({"agentlightning.reward.0.value": "many", "mail": "ann@example.org"}, name="one"),
        span(events=[event("gen_ai.evaluation.result", score), event("gen_ai.evaluation.result", score)], name="two"),
        resource={"fulgurite.rollout_id": f"{prefix}-bad"},
    )
    await send(kafka_settings, record(span()), b"reward, but no protobuf", bad, mine(prefix, 1), mine(prefix, 2))
    rules = RedactionSettings(values=[ValueRule(name="email")])
    async with translating(Settings(kafka=kafka_settings, redaction=rules)):
        values = await read(kafka_settings, REWARDS, 3)
        await read(kafka_settings, DEAD_LETTERS, 2)
    rewarded = {reward.rollout_id for reward in from_test(prefix, values)}
    assert rewarded == {f"{prefix}-1", f"{prefix}-2", f"{prefix}-bad"}
    letters = await read_topic(kafka_settings, DEAD_LETTERS)
    assert [dict(letter.headers)[HEADER_LINE] for letter in letters] == [b"1", b"2"]
    assert dict(letters[1].headers)[HEADER_MESSAGE].count(b"should be a finite number") == 2
    (first,), (second,) = (decode(otlp(letter.value)) for letter in letters)
    assert (first.name, second.name) == ("one", "two")
    assert first.attributes["mail"] == "[redacted:email]", "the span is a whole one all the same"
    assert first.resource == second.resource == {"fulgurite.rollout_id": f"{prefix}-bad"}
    assert [event.attributes for event in second.events] == [score, score]


async def test_a_reward_that_no_record_has_room_for_is_a_dead_letter_and_blocks_nobody(
    kafka_settings: KafkaSettings,
) -> None:
    prefix = kafka_settings.topic_prefix.strip(".")
    named = {f"agentlightning.reward.{number}.value": 1.0 for number in (0, 1)}
    named |= {"agentlightning.reward.1.name": "n" * 20_000}
    links = {f"agentlightning.link.0.{part}": "x" * 20_000 for part in ("key_match", "value_match")}
    large = {"fulgurite.rollout_id": f"{prefix}-large"}
    await send(kafka_settings, record(span(named), resource=large), record(span(AGL | links), resource=large))
    await send(kafka_settings, mine(prefix, 1))
    # The collector's bound need not be ours.
    ours = kafka_settings.model_copy(update={"max_record_bytes": 16_384})
    async with translating(Settings(kafka=ours)):
        values = await read(kafka_settings, REWARDS, 2)
        await read(kafka_settings, DEAD_LETTERS, 1)
    found = from_test(prefix, values)
    assert sorted((one.rollout_id, one.metadata) for one in found) == [(f"{prefix}-1", {}), (f"{prefix}-large", {})]
    (letter,) = await read_topic(kafka_settings, DEAD_LETTERS)
    said = dict(letter.headers)
    assert said[HEADER_REASON] == b"too_large"
    assert b"is larger than a record may be" in said[HEADER_MESSAGE]


async def test_what_nobody_can_decode_is_passed(kafka_settings: KafkaSettings) -> None:
    """Whole records around it are read, those of its own partition and of others, each once."""
    prefix = kafka_settings.topic_prefix.strip(".")
    name = f"{prefix}-otlp"  # everybody's topic is not spoilt
    kafka_settings = kafka_settings.model_copy(update={"otlp_topic": name})
    admin = AIOKafkaAdminClient(**connection_options(kafka_settings))
    await admin.start()
    await admin.create_topics([NewTopic(name, 2, 1)])
    await admin.close()
    with plain_builder():
        async with AIOKafkaProducer(**connection_options(kafka_settings)) as producer:
            for number in range(20):
                await producer.send_and_wait(name, mine(prefix, number), partition=number % 2)
                if number in (0, 7, 8, 19):
                    await send_poison(producer, name, number % 2, mine(prefix, 100 + number))
    async with translating(Settings(kafka=kafka_settings)):
        values = await read(kafka_settings, REWARDS, 20)
        await send(kafka_settings, mine(prefix, 20))
        values = await read(kafka_settings, REWARDS, len(values) + 1)
    found = sorted(reward.rollout_id for reward in from_test(prefix, values))
    assert found == sorted(f"{prefix}-{number}" for number in range(21))


class Crash(Exception):
    pass


@pytest.mark.parametrize("step", ["read", "published", "committed"])
async def test_a_crash_after_any_step_loses_nothing_and_repeats_under_the_same_ids(
    kafka_settings: KafkaSettings, step: str
) -> None:
    prefix = kafka_settings.topic_prefix.strip(".")
    settings = Settings(kafka=kafka_settings)
    await send(kafka_settings, *(mine(prefix, number) for number in range(20)))

    async def crash(at: str) -> None:
        if at == step:
            raise Crash

    with pytest.raises(Crash):
        async with asyncio.timeout(30):
            await serve(settings, asyncio.Event(), crash)
    await send(kafka_settings, mine(prefix, 20))
    async with translating(settings):
        found: list[Reward] = []
        async with asyncio.timeout(30):
            while {reward.rollout_id for reward in found} != {f"{prefix}-{number}" for number in range(21)}:
                found = from_test(prefix, await read(kafka_settings, REWARDS, 1))
    assert len({reward.reward_id for reward in found}) == 21
    if step == "committed":
        assert len(found) == 21

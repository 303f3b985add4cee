"""Rewards from judges, functions and rules, from spans to the trajectory that trains, against the real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from fulgurite.schemas import topics
from fulgurite.schemas.algorithm_settings import ComplianceRule
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import HEADER_MESSAGE, HEADER_REASON
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import (
    AggregatorSettings,
    AssemblerSettings,
    ComplianceSettings,
    KafkaSettings,
    RewardSource,
    Settings,
)
from fulgurite.schemas.spans import Span
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.streams.algorithms.aggregator import serve
from fulgurite.streams.algorithms.aggregator.judges import question_of
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.transcript import shortened
from fulgurite.streams.assembler import serve as assemble
from tests.streams.algorithms.algorithms_bus import send, until
from tests.streams.algorithms.judge_server import model_server
from tests.streams.assembler_records import finished, llm_call, queued, reward, started
from tests.streams.trainer_world import read_topic


def length(attempt: FinishedAttempt) -> float:
    if attempt.rollout_id == "broken":
        raise RuntimeError("no length")
    return float(sum(len(span.output) for span in attempt.spans))


async def two_sides(attempt: FinishedAttempt) -> dict[str, float]:
    return {"good": 2.0, "bad": -0.5}


def nothing(attempt: FinishedAttempt) -> None:
    return None


HERE = "tests.streams.algorithms.test_aggregator"


def attempt(rollout_id: str, **fields: Any) -> FinishedAttempt:
    call = Span(
        rollout_id=rollout_id,
        span_id=f"{rollout_id}-1",
        name="chat",
        operation="chat",
        start_ns=1,
        end_ns=2,
        input="2+2?",
        output=f"the answer of {rollout_id}",
    )
    values: dict[str, Any] = {"reward": 1.0, "spans": [call], "attempt_id": f"{rollout_id}-a", **fields}
    return FinishedAttempt(rollout_id=rollout_id, status="succeeded", **values)


@asynccontextmanager
async def aggregating(settings: Settings) -> AsyncGenerator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(serve(settings, stop))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


def with_sources(kafka: KafkaSettings, *sources: RewardSource, rules: Any = None, **aggregator: Any) -> Settings:
    return Settings(
        kafka=kafka,
        assembler=AssemblerSettings(output="attempts"),
        aggregator=AggregatorSettings(sources=list(sources), **aggregator),
        compliance=rules or ComplianceSettings(),
    )


def judge(url: str, tmp_path: Path, name: str = "judge", **fields: Any) -> RewardSource:
    template = tmp_path / "template.txt"
    template.write_text("Question: {input}\nAnswer: {output}\nHow good, from 0 to 10?")
    return RewardSource(name=name, url=url, model="critic", template=template, **fields)


async def trajectories(kafka: KafkaSettings, count: int) -> dict[str, Trajectory]:
    found = [decode(Trajectory, record.value) for record in await until(kafka, topics.TRAJECTORIES, count)]
    assert len({one.rollout_id for one in found}) == len(found), "each once"
    return {one.rollout_id: one for one in found}


async def test_from_spans_to_the_reward_that_trains(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    """The whole way: the assembler's barrier, a judge, a function, a rule; and no reward comes too late for it."""
    rules = ComplianceSettings(rules=[ComplianceRule(name="no-calls", operation="chat", max_calls=1, cost=0.25)])
    events = [queued("r"), started("r")]
    spans = [llm_call("r", 1, [1, 2], [3]), llm_call("r", 2, [1, 2, 3, 4], [5])]
    spans = [span.model_copy(update={"input": "2+2?", "output": "four"}) for span in spans]
    async with model_server(lambda question: "Well. 2+2 is 4.\nScore: 8") as server:
        sources = (
            judge(server.url, tmp_path, weight=0.1),
            RewardSource(name="length", function=f"{HERE}:length", weight=1.0, high=5.0),
        )
        settings = with_sources(kafka_settings, *sources, rules=rules)
        stop = asyncio.Event()
        assembling = asyncio.create_task(assemble(settings, stop))
        async with aggregating(settings):
            await send(kafka_settings, topics.ROLLOUTS, *events)
            await send(kafka_settings, topics.SPANS, *spans)
            await send(kafka_settings, topics.REWARDS, reward("r", 1.0))
            await send(kafka_settings, topics.ROLLOUTS, finished("r"))
            found = (await trajectories(kafka_settings, 1))["r"]
            given = [decode(Reward, r.value) for r in await until(kafka_settings, topics.REWARDS, 5)]
        # The assembler reads past the new rewards and must not take them for late ones.
        await send(kafka_settings, topics.SPANS, llm_call("r", 3, [1], [2]))
        (late,) = await until(kafka_settings, topics.DEAD_LETTERS, 1)
        stop.set()
        await assembling
    assert b"r-1-3" in late.value
    assert found.reward == pytest.approx(1.0 + 0.8 + 5.0 - 0.25)
    assert (found.partial, found.calls, len(found.sequences)) == ("", 2, 1)
    assert "spans" not in found.model_dump()
    assert [one.name for one in found.rewards] == ["reward", "judge", "length", "compliance", "reward"]
    by_name = {one.name: one for one in given}
    assert by_name["judge"].value == 8
    assert by_name["judge"].source == "judge"
    assert by_name["compliance"].span_id == "r-1-2"
    assert by_name["reward"].source == "aggregator"
    assert by_name["reward"].dimensions == pytest.approx(
        {"agent": 1.0, "judge": 0.8, "length": 5.0, "compliance": -0.25}
    )
    assert server.questions == ["Question: 2+2?\nAnswer: four\nHow good, from 0 to 10?"]
    assert server.bodies[0]["temperature"] == 0


async def test_what_fails_is_a_dead_letter_and_never_a_zero(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    def reply(question: str) -> str | int:
        return 400 if "of refused" in question else "hm" if "of vague" in question else "1"

    names = ["fine", "refused", "vague", "broken"]
    async with model_server(reply) as server:
        length_too = RewardSource(name="length", function=f"{HERE}:length")
        sources = (judge(server.url, tmp_path), length_too)
        async with aggregating(with_sources(kafka_settings, *sources, tries=2)):
            await send(kafka_settings, topics.ATTEMPTS, *(attempt(name) for name in names), b"not json")
            found = await trajectories(kafka_settings, 4)
            letters = await until(kafka_settings, topics.DEAD_LETTERS, 4)
    assert {name: one.partial for name, one in found.items() if one.reward is None} == dict.fromkeys(
        names[1:], "reward_failed"
    )
    assert found["fine"].reward is not None
    said = {dict(letter.headers)[HEADER_MESSAGE].decode() for letter in letters}
    reasons = sorted(dict(letter.headers)[HEADER_REASON].decode() for letter in letters)
    assert reasons == ["not_json", "reward_failed", "reward_failed", "reward_failed"]
    for expected in ("status 400", "no number in the answer 'hm'", "RuntimeError: no length"):
        assert any(expected in message for message in said), expected
    assert sum("of vague" in question for question in server.questions) == 2, "tried as often as the settings say"


async def test_a_judge_that_takes_no_temperature_is_asked_without(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    async with model_server(lambda question: "4") as server:
        bare = judge(server.url, tmp_path, name="bare", temperature="default")
        warm = judge(server.url, tmp_path, name="warm", temperature=0.5)
        async with aggregating(with_sources(kafka_settings, bare, warm, judge(server.url, tmp_path))):
            await send(kafka_settings, topics.ATTEMPTS, attempt("r"))
            found = await trajectories(kafka_settings, 1)
    assert found["r"].reward == 13.0
    assert sorted(str(body.get("temperature", "none")) for body in server.bodies) == ["0.0", "0.5", "none"]


async def test_a_judge_that_is_away_is_waited_for(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    replies: list[str | int] = [503, 429, "4"]
    async with (
        model_server(lambda question: replies.pop(0)) as server,
        aggregating(with_sources(kafka_settings, judge(server.url, tmp_path), tries=1)),
    ):
        await send(kafka_settings, topics.ATTEMPTS, attempt("r"))
        found = await trajectories(kafka_settings, 1)
    assert found["r"].reward == 5.0


async def test_verdicts_are_kept_and_what_cannot_be_scored_passes(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    said = iter(range(1, 100))
    same = attempt("same").spans
    sent = [
        attempt("one", spans=same),
        attempt("failed").model_copy(update={"status": "failed", "reward": None}),
        attempt("cut", partial="too_large"),
        attempt("unrewarded", reward=None, partial="no_reward", spans=same),
    ]
    async with model_server(lambda question: str(next(said))) as server:
        source = judge(server.url, tmp_path)
        settings = with_sources(kafka_settings, source, cache=tmp_path / "verdicts.sqlite")
        async with aggregating(settings):
            await send(kafka_settings, topics.ATTEMPTS, *sent)
            found = await trajectories(kafka_settings, 4)
        async with aggregating(settings):
            await send(kafka_settings, topics.ATTEMPTS, attempt("two", spans=same))
            found = await trajectories(kafka_settings, 5)
    assert found["one"].reward == found["two"].reward == 2.0
    assert len(server.questions) == 1, "asked once, over a restart and by two at once"
    assert (found["failed"].reward, found["failed"].rewards) == (None, [])
    assert (found["cut"].reward, found["cut"].partial) == (None, "too_large,unscored"), "the judge's part is missing"
    assert (found["unrewarded"].reward, found["unrewarded"].partial) == (None, "no_reward")


@pytest.mark.parametrize(
    ("sources", "fields", "expected"),
    [
        ([("two_sides", {})], {"agent_weight": 0.0}, (1.5, "")),
        ([("two_sides", {"low": 0.0, "high": 1.0, "weight": 2.0})], {"agent_weight": 3.0}, (5.0, "")),
        ([("nothing", {"required": False})], {}, (1.0, "")),
        ([("nothing", {})], {}, (None, "reward_failed")),
        ([("two_sides", {})], {"low": -1.0, "high": 0.25}, (0.25, "")),
        ([("nothing", {"required": False})], {"agent_weight": 0.0}, (None, "no_reward")),
    ],
)
async def test_the_sum(
    kafka_settings: KafkaSettings, sources: list[Any], fields: dict[str, Any], expected: tuple[float | None, str]
) -> None:
    made = [RewardSource(name=name, function=f"{HERE}:{name}", **rest) for name, rest in sources]
    async with aggregating(with_sources(kafka_settings, *made, **fields)):
        await send(kafka_settings, topics.ATTEMPTS, attempt("r"))
        found = (await trajectories(kafka_settings, 1))["r"]
    assert (found.reward, found.partial) == expected
    letters = await read_topic(kafka_settings, topics.DEAD_LETTERS)
    assert len(letters) == (expected[1] == "reward_failed")


async def test_what_kafka_forgot_before_it_was_read_stops_nothing(
    kafka_settings: KafkaSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = with_sources(kafka_settings, RewardSource(name="length", function=f"{HERE}:length"))
    async with aggregating(settings):
        await send(kafka_settings, topics.ATTEMPTS, *(attempt(f"a{number}") for number in range(6)))
        await trajectories(kafka_settings, 6)
    await send(kafka_settings, topics.ATTEMPTS, *(attempt(f"b{number}") for number in range(12)))
    everything = {
        TopicPartition(kafka_settings.topic(topics.ATTEMPTS), number): RecordsToDelete(before_offset=-1)
        for number in range(kafka_settings.partitions)
    }
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_settings.bootstrap_servers)
    await admin.start()
    await admin.delete_records(everything)
    await admin.close()
    async with aggregating(settings):
        await send(kafka_settings, topics.ATTEMPTS, attempt("c"))
        found = await trajectories(kafka_settings, 7)
    assert found["c"].reward is not None
    assert "were not read, and Kafka no longer has them" in caplog.text


async def test_a_trajectory_that_its_rewards_make_too_large_says_so(kafka_settings: KafkaSettings) -> None:
    kafka = kafka_settings.model_copy(update={"max_record_bytes": 20_000})
    rules = ComplianceSettings(rules=[ComplianceRule(name="no-a", pattern="a", cost=0.001)])
    talkative = attempt("r").spans[0].model_copy(update={"output": "a" * 300})
    async with aggregating(with_sources(kafka, rules=rules)):
        await send(kafka_settings, topics.ATTEMPTS, attempt("r", spans=[talkative]))
        found = (await trajectories(kafka_settings, 1))["r"]
    assert (found.partial, found.rewards, found.reward) == ("too_large", [], pytest.approx(0.7))
    assert len(await read_topic(kafka_settings, topics.REWARDS)) == 301


async def test_a_function_that_is_not_there_is_told_at_once(kafka_settings: KafkaSettings) -> None:
    source = RewardSource(name="gone", function=f"{HERE}:gone")
    with pytest.raises(SettingsError, match=r"function of gone.*has no gone"):
        await serve(with_sources(kafka_settings, source), asyncio.Event())


def test_questions_take_nothing_the_agent_says_for_a_place() -> None:
    sly = attempt("r", agent="a")
    sly.spans[0].output = "ignore {input} and {agent}"
    template = "{agent}|{input}|{output}|{status}|{unknown}|{{}}"
    assert question_of(template, sly, 100) == "a|2+2?|ignore {input} and {agent}|succeeded|{unknown}|{{}}"
    assert question_of("{transcript}", sly, 100) == "[chat]\nin: 2+2?\nout: ignore {input} and {agent}"
    short = shortened("a" * 500 + "b" * 500, 100)
    assert len(short) == 100
    assert (short[0], short[-1]) == ("a", "b")


def test_old_verdicts_make_room(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "folder" / "verdicts.sqlite", 10)
    for number in range(30):
        verdicts.put(f"q{number}", str(number))
    verdicts.put("q25", "again")
    kept: Callable[[int], str | None] = lambda number: verdicts.get(f"q{number}")  # noqa: E731
    assert [kept(number) for number in (5, 19, 20, 25, 29)] == [None, None, "20", "again", "29"]
    verdicts.close()

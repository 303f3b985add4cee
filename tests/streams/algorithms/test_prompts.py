"""The search for a prompt: a scripted critic over real HTTP, and agents whose reward depends on their template."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from fulgurite.producers.prompts import PromptTemplates
from fulgurite.schemas.codec import decode, decode_union
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.resources import ResourceVersion, prompt_version
from fulgurite.schemas.rollouts import ROLLOUT_EVENT, RolloutQueued
from fulgurite.schemas.settings import KafkaSettings, PromptSettings, Settings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import ALGORITHM_STATE, RESOURCES, ROLLOUTS, SPANS, TRAINING, TRAJECTORIES
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.chat import ChatModel, NoAnswer
from fulgurite.streams.algorithms.prompts import serve
from fulgurite.streams.algorithms.prompts.critic import Critic, template_in
from fulgurite.streams.algorithms.prompts.search import Example, Search
from fulgurite.streams.trainer.ownership import ResourceTaken
from tests.streams.algorithms.algorithms_bus import send
from tests.streams.algorithms.judge_server import ModelServer, model_server
from tests.streams.trainer_world import read_topic, training_events

RUN = "search"
GOOD = ("step by step", "check", "unit")
"""What makes the toy agent better, each by a third."""


class Killed(BaseException):
    """Stands for kill -9."""


def task(index: int) -> dict[str, str]:
    return {"question": f"{index}+{index}"}


def worth(template: str) -> float:
    return sum(word in template for word in GOOD) / len(GOOD)


def critic(question: str) -> str | int:
    """A critique names what is missing; an edit heeds it. Each third edit is useless: it loses the place."""
    template = re.findall(r"<template>\n(.*?)\n</template>", question, re.DOTALL)[0]
    missing = [word for word in GOOD if word not in template]
    if "A reviewer says:" not in question:
        assert "reward" in question
        assert "answered: I was told" in question
        return f"Missing: {missing[0] if missing else 'nothing'}."
    said = re.findall(r"Missing: (.*?)\.", question)[0]
    if len(template) % 3 == 0:
        return "<template>no place at all</template>"
    return f"Here it is:\n<template>\n{template} And {said}!\n</template>"


@contextlib.asynccontextmanager
async def agents(kafka: KafkaSettings, lost: Callable[[str], bool] = lambda _: False) -> AsyncGenerator[list[str]]:
    """Whoever runs agents: does what is queued with the template that the rollout is pinned to."""
    prompts = PromptTemplates(kafka)
    done: list[str] = []
    stop = asyncio.Event()

    async def act() -> None:
        while not stop.is_set():
            for record in await read_topic(kafka, ROLLOUTS):
                queued = decode_union(ROLLOUT_EVENT, "RolloutEvent", record.value)
                assert isinstance(queued, RolloutQueued)
                if queued.rollout_id not in done:
                    done.append(queued.rollout_id)
                    if not lost(queued.rollout_id):
                        await answer(queued)
            await asyncio.sleep(0.1)

    async def answer(queued: RolloutQueued) -> None:
        template = await prompts.get("greeting", str((queued.model_extra or {})["resources_id"]))
        attempt_id = f"{queued.rollout_id}-a"
        said = Span(
            rollout_id=queued.rollout_id,
            attempt_id=attempt_id,
            span_id=f"{queued.rollout_id}-s",
            name="chat",
            operation="chat",
            start_ns=1,
            end_ns=2,
            input=template.render(**queued.input),
            output=f"I was told {template.render(**queued.input)}",
        )
        ended = Trajectory(
            rollout_id=queued.rollout_id,
            attempt_id=attempt_id,
            run_id=queued.run_id,
            group_id=queued.group_id,
            group_size=queued.group_size,
            mode=queued.mode,
            status="succeeded",
            reward=worth(template.text),
        )
        await send(kafka, SPANS, said)
        await send(kafka, TRAJECTORIES, ended)

    acting = asyncio.create_task(act())
    try:
        yield done
    finally:
        stop.set()
        await acting
        await prompts.close()


def settings_for(kafka: KafkaSettings, server: ModelServer, tmp_path: Path, **changes: Any) -> Settings:
    seed = tmp_path / "seed.txt"
    seed.write_text("Answer {question}")
    values: dict[str, Any] = {
        "run_id": RUN,
        "resource": "greeting",
        "seed": seed,
        "tasks": "tests.streams.algorithms.test_prompts:task",
        "critic_url": server.url,
        "critic_model": "critic",
        "must_contain": ["{question}"],
        "rounds": 3,
        "beam_width": 2,
        "branch_factor": 2,
        "val_batch": 2,
        "gradient_batch": 1,
        **changes,
    }
    return Settings(kafka=kafka, prompt=PromptSettings.model_validate(values))


async def versions(kafka: KafkaSettings, resource: str) -> list[ResourceVersion]:
    found = [decode(ResourceVersion, record.value) for record in await read_topic(kafka, RESOURCES)]
    return [version for version in found if version.resource == resource]


async def steps_of(kafka: KafkaSettings) -> list[TrainingStep]:
    return [event for event in await training_events(kafka, RUN) if isinstance(event, TrainingStep)]


async def test_the_template_gets_better_and_a_killed_search_goes_on(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    async with model_server(critic) as server, agents(kafka_settings) as done:
        settings = settings_for(kafka_settings, server, tmp_path)
        for dies_at in ("begun", "committed", "read", "scored", "asked", "sent", "proposed"):

            def hook(step: str, dies_at: str = dies_at) -> None:
                if step == dies_at:
                    raise Killed

            with pytest.raises(Killed):
                async with asyncio.timeout(30):
                    await serve(settings, asyncio.Event(), hook)
        async with asyncio.timeout(60):
            await serve(settings, asyncio.Event())
        rollouts = await read_topic(kafka_settings, ROLLOUTS)
        await serve(settings, asyncio.Event())  # over: nothing more happens
    events = await training_events(kafka_settings, RUN)
    assert [type(events[0]), type(events[-1])] == [RunStarted, RunFinished]
    assert sum(isinstance(event, RunStarted | RunFinished) for event in events) == 2
    steps = await steps_of(kafka_settings)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert [round(step.metrics["prompt/best"], 3) for step in steps] == [0, 0.333, 0.667, 1.0]

    found = await versions(kafka_settings, "greeting")
    assert [version.version for version in found] == [1, 2, 3, 4]
    assert [version.kind for version in found] == ["prompt_template"] * 4
    assert found[0].content == "Answer {question}"
    assert worth(found[-1].content) == 1.0
    assert "{question}" in found[-1].content

    queued = [record.key.decode() for record in rollouts]
    assert len(queued) == len(set(queued)), "each rollout is asked for once, whatever was killed"
    assert set(queued) == set(done) == {rollout_id for step in steps for rollout_id in step.rollout_ids}
    assert len(queued) == steps[-1].metrics["prompt/rollouts"]


async def test_budgets_hold_and_a_lost_rollout_costs_no_candidate(
    kafka_settings: KafkaSettings, tmp_path: Path
) -> None:
    async with (
        model_server(critic) as server,
        agents(kafka_settings, lambda rollout_id: rollout_id == f"{RUN}-c0-t1") as done,
    ):
        settings = settings_for(
            kafka_settings, server, tmp_path, max_rollouts=6, max_critic_calls=4, candidate_deadline_seconds=2,
            critic_temperature="default",
        )  # fmt: skip
        async with asyncio.timeout(60):
            await serve(settings, asyncio.Event())
    assert len(server.questions) <= 4
    assert not any("temperature" in body for body in server.bodies)
    assert len(done) <= 6
    first, *_ = await steps_of(kafka_settings)
    assert first.metrics["prompt/out"] == 0
    assert first.reward_mean == 0.0
    (last,) = [event for event in await training_events(kafka_settings, RUN) if isinstance(event, RunFinished)]
    assert "4 calls of the critic" in last.reason


async def stopped_at(step: str, settings: Settings) -> None:
    def hook(reached: str) -> None:
        if reached == step:
            raise Killed

    with pytest.raises(Killed):
        async with asyncio.timeout(30):
            await serve(settings, asyncio.Event(), hook)


@pytest.mark.parametrize(("stop", "rounds"), [("scored", 1), ("proposed", 2)])
async def test_a_smaller_budget_ends_a_search_that_goes_on(
    kafka_settings: KafkaSettings, tmp_path: Path, stop: str, rounds: int
) -> None:
    async with model_server(critic) as server, agents(kafka_settings):
        await stopped_at(stop, settings_for(kafka_settings, server, tmp_path))
        async with asyncio.timeout(60):
            await serve(settings_for(kafka_settings, server, tmp_path, max_critic_calls=1), asyncio.Event())
        assert len(server.questions) == 2 * (rounds - 1)
    events = await training_events(kafka_settings, RUN)
    assert [type(event) for event in events] == [RunStarted, *[TrainingStep] * rounds, RunFinished]


@pytest.mark.parametrize(("name", "value"), [("val_batch", 4), ("agent", "other"), ("tasks", f"{__name__}:critic")])
async def test_what_would_make_candidates_incomparable_is_refused(
    kafka_settings: KafkaSettings, tmp_path: Path, name: str, value: Any
) -> None:
    async with model_server(critic) as server, agents(kafka_settings):
        await stopped_at("scored", settings_for(kafka_settings, server, tmp_path))
        changed = settings_for(kafka_settings, server, tmp_path, **{name: value})
        with pytest.raises(SettingsError, match=rf"prompt\.{name} = {value}, but search {RUN} began with "):
            await serve(changed, asyncio.Event())


async def test_templates_that_its_record_has_no_room_for_do_not_end_a_search(
    kafka_settings: KafkaSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it remembers is one record: bounded like others, and of examples the worst ones stay."""
    small = kafka_settings.model_copy(update={"max_record_bytes": 40_000})

    numbers = itertools.count()

    def wordy(question: str) -> str | int:
        said = str(critic(question))
        return said.replace("!\n</template>", f" {next(numbers)} {'é' * 3_000}!\n</template>")

    caplog.set_level("INFO")
    async with model_server(wordy) as server, agents(kafka_settings):
        settings = settings_for(small, server, tmp_path, gradient_batch=4)
        async with asyncio.timeout(60):
            await serve(settings, asyncio.Event())
        refused = settings_for(small, server, tmp_path, run_id="long")
        (tmp_path / "seed.txt").write_text("Answer {question}" + "é" * 15_000)
        with pytest.raises(SettingsError, match=r"its 30019 bytes have no room .*kafka\.max_record_bytes = 40000"):
            await serve(refused, asyncio.Event())
    assert "bytes have no room in the search's record" in caplog.text
    steps = await steps_of(kafka_settings)
    assert steps[-1].metrics["prompt/best"] > 0
    assert isinstance((await training_events(kafka_settings, RUN))[-1], RunFinished)
    remembered = [len(record.value) for record in await read_topic(kafka_settings, ALGORITHM_STATE) if record.value]
    assert 20_000 < max(remembered) <= 40_000


async def test_another_writer_ends_the_search(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    async with model_server(critic) as server, agents(kafka_settings):
        settings = settings_for(kafka_settings, server, tmp_path)

        def hook(step: str) -> None:
            if step == "scored":
                raise Killed

        with pytest.raises(Killed):
            await serve(settings, asyncio.Event(), hook)
        await send(kafka_settings, RESOURCES, prompt_version("greeting", 9, "mine"))
        with pytest.raises(ResourceTaken, match="version 9 was announced by a writer without run_id"):
            await serve(settings, asyncio.Event())


async def test_the_name_of_a_training_run_is_taken(kafka_settings: KafkaSettings, tmp_path: Path) -> None:
    """Both write what became of the name to the same key of `training`; a restart believes what it finds there."""
    trained = RunStarted(run_id=RUN, step=0, resource="policy", version=1, steps_total=4)
    await send(kafka_settings, TRAINING, trained)
    async with model_server(critic) as server:
        settings = settings_for(kafka_settings, server, tmp_path)
        with pytest.raises(SettingsError, match="a run of this name makes versions of policy already"):
            await serve(settings, asyncio.Event())
    assert await read_topic(kafka_settings, RESOURCES) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_id": ""}, r"prompt\.run_id is empty"),
        ({"critic_model": ""}, r"prompt\.critic_model is empty"),
        ({"max_rollouts": 1}, "not enough for one candidate"),
        ({"seed": None}, "no prompt template greeting yet"),
        ({"must_contain": ["{answer}"]}, r"cannot be used: it lacks \{answer\}"),
        ({"edit_template": "/no/such/file"}, r"prompt\.edit_template = /no/such/file"),
    ],
)
async def test_what_cannot_be_run_is_refused(
    kafka_settings: KafkaSettings, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    async with model_server(critic) as server:
        settings = settings_for(kafka_settings, server, tmp_path, **changes)
        with pytest.raises(SettingsError, match=words):
            await serve(settings, asyncio.Event())
    assert await read_topic(kafka_settings, RESOURCES) == []


@given(st.data())
def test_no_search_spends_more_than_its_budgets(data: st.DataObject) -> None:
    draw = data.draw
    settings = PromptSettings(
        rounds=draw(st.integers(1, 4)),
        beam_width=draw(st.integers(1, 3)),
        branch_factor=draw(st.integers(1, 3)),
        val_batch=draw(st.integers(1, 4)),
        max_rollouts=draw(st.integers(4, 60)),
        max_critic_calls=draw(st.integers(1, 20)),
    )
    search = Search(run_id="r", resource="p", version=1)
    search.first("seed", 1, settings)
    best = -1.0
    while search.phase != "over":
        if search.phase == "propose":
            found = search.next_parent(settings)
            assert found is not None
            assert found[0].number in search.beam
            text = draw(st.sampled_from([None, "", "seed", *(f"t{i}" for i in range(30))]))
            search.proposed(found[0], text, 1, settings)
            continue
        tried = search.waiting()
        rewards = {c.number: [draw(st.sampled_from([None, 0.0, 0.5, 1.0]))] * settings.val_batch for c in tried}
        examples = {c.number: [Example(input="", output="", reward=0.0)] for c in tried}
        search.scored(rewards, examples, settings)
        scores = [candidate.score for candidate in search.candidates if candidate.score is not None]
        assert max(scores, default=-1.0) >= best, "the best that was found stays"
        best = max(scores, default=-1.0)
        assert not scores or search.candidates[search.published].score == best
    assert search.rollouts <= settings.max_rollouts
    assert search.critic_calls <= settings.max_critic_calls
    assert search.round <= settings.rounds + 1
    texts = [candidate.text for candidate in search.candidates]
    assert len(texts) == len(set(texts))


def after_trials(*trials: Sequence[float | None]) -> tuple[list[float | None], str]:
    """Scores of the seed and of edits, each tried in a round of its own; and which of them is served."""
    settings = PromptSettings(val_batch=len(trials[0]), rounds=9)
    search = Search(run_id="r", resource="p", version=1)
    search.first("c0", 1, settings)
    for number, rewards in enumerate(trials):
        if number:
            search.proposed(search.candidates[0], f"c{number}", 1, settings)
        search.scored({number: rewards}, {}, settings)
    search = Search.model_validate_json(search.model_dump_json())
    return [candidate.score for candidate in search.candidates], search.candidates[search.published].text


def test_crashing_on_hard_tasks_does_not_pay() -> None:
    seed: list[float | None] = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert after_trials(seed, [1.0] * 4 + [None] * 4) == ([0.625, 0.5], "c0")
    assert after_trials([1.0] * 4 + [None] * 4, seed) == ([0.5, 0.625], "c1"), "also where the zero is seen later"
    assert after_trials([0.0, 0.0], [None, 1.0]) == ([0.0, 0.5], "c1")
    assert after_trials([-1.0, 1.0], [None, 1.0], [1.0, 1.0]) == ([0.0, 0.0, 1.0], "c2"), "the lowest is no zero"
    assert after_trials([1.0] * 4, [1.0, None, None, None]) == ([1.0, None], "c0"), "with less than min_share it is out"


def test_what_is_no_reward_counts_as_the_lowest_one() -> None:
    """Neither may it decide alone, nor can such numbers be added up."""
    assert after_trials([1.0, 0.0], [1.7e308, 1.0], [1.0, 1.0]) == ([0.5, 0.5, 1.0], "c2")
    assert after_trials([1.0, 0.0], [-1.7e308, 1.0]) == ([0.5, 0.5], "c0")
    assert after_trials([1.0, 0.0], [1.7e308, 1.7e308]) == ([0.5, None], "c0")
    assert after_trials([1.0, 0.0], [1e9, 1e9]) == ([0.5, 1e9], "c1"), "as large as rewards may be"


def test_the_template_stands_between_the_marks() -> None:
    assert template_in("a <template>x</template> b <template>\ny\n</template>") == "y"
    chatter = "I will answer within <template> tags.\n"
    assert template_in(f"{chatter}<template>Be brief: {{question}}</template>") == "Be brief: {question}"
    assert template_in(f"{chatter}<template>x</template> That was </template>, as asked; <template> began it.") == "x"
    assert template_in("<template>x</template> and once more: <template>y") == "x", "the second is cut off"
    assert template_in("</template> ends it. <template>") is None
    assert template_in(f"{chatter}<template></template>") == ""
    assert template_in("<template>\nBe brief {question}") is None, "cut off"
    assert template_in("I'm sorry, I cannot help with that.") is None


def test_an_edit_keeps_the_places_of_the_seed_where_nothing_else_is_asked() -> None:
    search = Search(run_id="r", resource="p")
    settings = PromptSettings()
    assert search.fault("Any {thing} will do", settings) == "", "there is no seed yet"
    search.first("Answer {question} as {'json': 1}, {style}.", 1, settings)
    assert search.fault("Be brief: {question}", settings) == "it lacks {style}"
    assert search.fault("{style}: {question}", settings) == ""
    chosen = PromptSettings(must_contain=["{question}"])
    assert search.fault("Be brief: {question}", chosen) == ""


async def test_a_model_that_drips_its_answer_has_no_more_time_than_another() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(5):
        model = ChatModel(client, f"http://127.0.0.1:{port}/v1", "m", SecretStr(""), 0.5)
        with pytest.raises(NoAnswer, match=r"no answer within 0\.5 s"):
            await model.ask("?", 0.0)


@pytest.mark.parametrize(
    ("head", "body", "words"),
    [
        (b"", b"[" * 200_000, "no chat completion"),
        (b"content-encoding: gzip\r\n", b"nothing of the kind", "not encoded as it says"),
    ],
)
async def test_an_answer_that_cannot_be_read_is_none(head: bytes, body: bytes, words: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(20):
        model = ChatModel(client, f"http://127.0.0.1:{port}/v1", "m", SecretStr(""), 10.0)
        with pytest.raises(NoAnswer, match=words):
            await model.ask("?", 0.0)


async def test_a_wrong_key_uses_up_no_question(caplog: pytest.LogCaptureFixture) -> None:
    """It is waited for until somebody has mended it, and the log says what to look at."""
    said: list[str | int] = [401, 404, "better"]
    async with model_server(lambda _: said.pop(0)) as server, httpx.AsyncClient(trust_env=False) as client:
        model = ChatModel(client, server.url, "m", SecretStr("sk-old"), 5.0)
        assert await asyncio.wait_for(model.ask("?", 0.0), 20) == "better"
    assert "answers 401" in caplog.text
    assert "look at its key, url and model" in caplog.text
    assert "sk-old" not in caplog.text


async def test_half_a_character_in_an_answer_is_replaced() -> None:
    """A surrogate that stands alone is JSON, and text that nothing can encode: it would end whoever asked."""
    said = "good \ud83d score 7 \ude00\ud83d\ude00, \ud83d"
    async with model_server(lambda _: said) as server, httpx.AsyncClient(trust_env=False) as client:
        answer = await ChatModel(client, server.url, "m", SecretStr(""), 5.0).ask("?", 0.0)
    assert answer == "good \ufffd score 7 \ufffd\U0001f600, \ufffd"
    assert answer.encode()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gradient_template", "What is wrong with {template}?", r"needs \{examples\}"),
        ("gradient_template", "{template} {examples} {critique}", r"\{critique\} has no value here"),
        ("edit_template", "Write a better one: {critique}", r"needs \{template\}"),
        ("edit_template", "Write {template} anew", r"needs \{critique\}"),
        ("edit_template", "{template} {critique}: keep {question}", ""),
    ],
)
async def test_a_question_to_the_critic_without_its_places_is_refused(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / "question.txt").write_text(text)
    settings = PromptSettings.model_validate({name: tmp_path / "question.txt"})
    refused = pytest.raises(SettingsError, match=rf"prompt\.{name} = .*{words}") if words else contextlib.nullcontext()
    async with httpx.AsyncClient() as client:
        model = ChatModel(client, "http://127.0.0.1:1/v1", "m", SecretStr(""), 1.0)
        with refused:
            Critic(model, settings)

"""SFT: from the best of each group, live, and from a file of demonstrations, with restarts; against the real broker."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from examples.calculator.model import train_tokenizer
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import KafkaSettings, Settings, SourceSettings, TrainerSettings
from fulgurite.schemas.training import TrainingStep
from fulgurite.streams.trainer import serve
from fulgurite.streams.trainer.demonstrating import order
from fulgurite.streams.trainer.demonstrations import prepare, prepared
from fulgurite.streams.trainer.imitation import best
from fulgurite.streams.trainer.plan import make_plan
from tests.streams.trainer_world import LIKED, World, all_once, build_model, training_events

RUN = "run"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny") / "model")


def settings_for(model: Path, output: Path, **changes: Any) -> TrainerSettings:
    values: dict[str, Any] = {
        "run_id": RUN,
        "model": model,
        "output": output,
        "loss": "sft",
        "steps": 3,
        "groups_per_step": 4,
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        **changes,
    }
    return TrainerSettings.model_validate(values)


async def train(kafka: KafkaSettings, trainer: TrainerSettings) -> None:
    async with asyncio.timeout(90):
        await serve(Settings(kafka=kafka, trainer=trainer), asyncio.Event())


async def steps_of(kafka: KafkaSettings, run_id: str = RUN) -> list[TrainingStep]:
    return [event for event in await training_events(kafka, run_id) if isinstance(event, TrainingStep)]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_best_are_the_best(rewards: list[float], share: float) -> None:
    wanted = best(rewards, share, None)
    taken = [reward for reward, is_wanted in zip(rewards, wanted, strict=True) if is_wanted]
    left = [reward for reward, is_wanted in zip(rewards, wanted, strict=True) if not is_wanted]
    assert 1 <= len(taken) < share * len(rewards) + 1
    assert min(taken) >= max(left, default=-1.0)
    threshold = sorted(rewards)[len(rewards) // 2]
    assert best(rewards, 1.0, threshold) == [reward >= threshold for reward in rewards]


async def test_the_best_of_each_group_are_learned(
    kafka_settings: KafkaSettings, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = settings_for(
        tiny_model,
        tmp_path,
        tasks="tests.streams.trainer_world:bandit",
        steps=8,
        groups_per_step=8,
        group_size=8,
        best_share=0.25,
    )
    async with World(kafka_settings).running() as world:
        await train(kafka_settings, trainer)
    steps = await steps_of(kafka_settings)
    assert steps[-1].reward_mean > steps[0].reward_mean + 0.2
    assert all(step.metrics["critic/advantages/mean"] == 1.0 for step in steps)
    fates = all_once(await training_events(kafka_settings, RUN))
    assert set(fates) == set(world.queued)
    assert set(fates.values()) <= {"trained", "not_best", "zero_variance"}
    for step in steps:
        silent = sum(dropped.reason == "zero_variance" for dropped in step.dropped) // 8
        assert len(step.rollout_ids) == 2 * (step.groups - silent)


async def test_the_best_of_another_runs_rollouts_are_learned_from_the_log(
    kafka_settings: KafkaSettings, tiny_model: Path, tmp_path: Path
) -> None:
    """What lies on `trajectories` as demonstrations: a replay (source.run_id) with this loss."""
    live = TrainerSettings(
        run_id="live",
        model=tiny_model,
        output=tmp_path,
        tasks="tests.streams.trainer_world:bandit",
        steps=2,
        groups_per_step=4,
        group_size=4,
    )
    async with World(kafka_settings).running():
        await train(kafka_settings, live)
    own = TrainerSettings(run_id=RUN, resource="best", output=tmp_path, loss="sft", best_threshold=0.3)
    replay = Settings(kafka=kafka_settings, trainer=own, source=SourceSettings(run_id="live"))
    async with asyncio.timeout(90):
        await serve(replay, asyncio.Event())
    steps = await steps_of(kafka_settings)
    assert [step.step for step in steps] == [1, 2]
    fates = all_once(await training_events(kafka_settings, RUN))
    assert set(fates) == set(all_once(await training_events(kafka_settings, "live")))
    assert set(fates.values()) == {"trained", "not_best"}
    assert all(len(step.rollout_ids) <= step.groups for step in steps)


def token_lines(count: int) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": [0, 1 + i % 4], "response_token_ids": [LIKED, LIKED, LIKED]} for i in range(count)]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def stopped_after(kafka: KafkaSettings, trainer: TrainerSettings, steps: int) -> None:
    """A life that ends, in the middle of whatever it does, when so many steps are committed."""
    stop = asyncio.Event()
    running = asyncio.create_task(serve(Settings(kafka=kafka, trainer=trainer), stop))
    async with asyncio.timeout(60):
        while True:
            if len(await steps_of(kafka, trainer.run_id)) >= steps:
                break
            await asyncio.sleep(0.05)
    stop.set()
    await running


async def test_demonstrations_are_learned_each_once_a_pass_and_a_restart_makes_the_same_weights(
    kafka_settings: KafkaSettings, tiny_model: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "demonstrations.jsonl", token_lines(6))
    whole = settings_for(tiny_model, tmp_path, demonstrations=file, steps=6)
    halves = whole.model_copy(update={"run_id": "halves", "resource": "halves"})
    await train(kafka_settings, whole)
    await stopped_after(kafka_settings, halves, 2)
    file.unlink()  # the run has its own
    for name in ("groups_per_step", "seed"):  # some would be learned twice, others never
        with pytest.raises(SettingsError, match=rf"trainer\.{name} = 7, but run halves began with"):
            await train(kafka_settings, halves.model_copy(update={name: 7}))
    await train(kafka_settings, halves)

    steps = await steps_of(kafka_settings, "halves")
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    trained = [rollout_id for step in steps for rollout_id in step.rollout_ids]
    assert sorted(trained) == sorted(f"halves-d{index}-p{number}" for number in range(4) for index in range(6))
    assert steps[-1].loss < steps[0].loss - 0.5
    assert steps[-1].staleness_max == 0
    assert not [name for name in steps[0].metrics if name.startswith(("rollout_corr/", "sampling/"))]
    one, other = (load_file(next((tmp_path / run).glob("v*7/weights/model.safetensors"))) for run in (RUN, "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_conversations_and_completions_become_tokens(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_model(model)
    tokenizer = train_tokenizer(seed=1, conversations=200)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}"
    )
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps(config))
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")]
    lines: list[Any] = [
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"prompt": "3+3=", "completion": "6"},
        {"prompt": [{"role": role, "content": content} for role, content in turns[:3]],
         "completion": [{"role": "assistant", "content": "4"}]},
        {"rollout_id": "r", "status": "succeeded", "sequences": [
            {"token_ids": [1, 2, 3], "loss_mask": [0, 1, 0], "logprobs": [0.0, -1.0, 0.0]}]},
    ]  # fmt: skip
    lines.append({"partition": 0, "offset": 7, "value": lines[-1]})
    file = write(tmp_path / "demonstrations.jsonl", lines)
    plan = make_plan(Settings(trainer=settings_for(model, tmp_path / "out", demonstrations=file)))
    talk, completion, answered, sampled, tailed = prepared(plan, prepare(plan))
    assert tailed == sampled
    learned = [token for token, learn in zip(talk.token_ids, talk.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learned) == tokenizer.decode(tokenizer.encode("2\n4\n", add_special_tokens=False))
    assert sum(talk.loss_mask) < len(talk.token_ids)
    assert answered.token_ids == talk.token_ids
    learned = [token for token, learn in zip(answered.token_ids, answered.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learned) == tokenizer.decode(tokenizer.encode("4\n", add_special_tokens=False))
    assert completion.loss_mask[0] == 0
    assert completion.token_ids[-1] == tokenizer.eos_token_id
    assert (sampled.token_ids, sampled.loss_mask) == ([1, 2, 3], [0, 1, 0])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 2: .*"),
        ('{"text": "x"}', "line 2: must have messages"),
        ('{"prompt_token_ids": [1], "response_token_ids": []}', "line 2: there is nothing to learn"),
        ('{"prompt_token_ids": [1], "response_token_ids": [99]}', "line 2: token id 99"),
        ('{"prompt_token_ids": [], "response_token_ids": [1]}', "line 2: the first token"),
        (
            '{"prompt_token_ids": "ab", "response_token_ids": [1]}',
            "line 2: prompt_token_ids must be a list of integers",
        ),
        ('{"prompt_token_ids": [1], "response_token_ids": "34"}', "line 2: response_token_ids must be a list"),
        ('{"prompt_token_ids": null, "response_token_ids": [1]}', "line 2: prompt_token_ids must be a list"),
        ('{"prompt_token_ids": [1], "response_token_ids": 3}', "line 2: response_token_ids must be a list"),
        ('{"prompt_token_ids": [1], "response_token_ids": [3.0]}', "line 2: response_token_ids must be a list"),
        ('{"prompt_token_ids": [1], "response_token_ids": [true]}', "line 2: response_token_ids must be a list"),
        ('{"prompt": "a", "completion": null}', "line 2: prompt and completion must be two texts or two lists"),
        ('{"prompt": "a", "completion": 7}', "line 2: prompt and completion must be two texts or two lists"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "line 2: prompt and completion"),
        ('{"messages": "hello"}', "line 2: messages must be a list"),
        ('{"messages": ["hello"]}', r"line 2: messages\[0\] must be an object"),
        ('{"messages": [{"role": "assistant", "content": 7}]}', r"line 2: messages\[0\]: content"),
        ('{"messages": [{"role": "assistant", "content": null}]}', r"line 2: messages\[0\]: content"),
        ('{"prompt": [], "completion": [{"content": "x"}]}', r"line 2: completion\[0\] must be an object"),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tiny_model: Path, tmp_path: Path, line: str, words: str) -> None:
    file = write(tmp_path / "demonstrations.jsonl", token_lines(1))
    file.write_text(file.read_text() + line + "\n")
    demonstrations_refused(tiny_model, tmp_path, file, words)


def test_a_line_that_is_no_text_is_named(tiny_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "demonstrations.jsonl", token_lines(1))
    file.write_bytes(file.read_bytes() + b'{"prompt": "\xff"}\n')
    demonstrations_refused(tiny_model, tmp_path, file, "line 2: .*utf-8")


def test_who_was_overtaken_puts_other_demonstrations_beside_the_runs(tiny_model: Path, tmp_path: Path) -> None:
    """A start that slept, and wakes up when the run is another's: what that one trains on stays what it is."""
    file = write(tmp_path / "demonstrations.jsonl", token_lines(6))
    plan = make_plan(Settings(trainer=settings_for(tiny_model, tmp_path / "out", demonstrations=file)))
    ours, again = prepare(plan), prepare(plan)
    before = list(prepared(plan, ours))
    write(file, token_lines(3))
    theirs = prepare(plan)
    assert (ours == again, ours == theirs, len(before)) == (True, False, 6)
    assert list(prepared(plan, ours)) == before
    (plan.folder / ours).write_bytes((plan.folder / theirs).read_bytes())
    with pytest.raises(StartError, match="is not what it was written with"):
        list(prepared(plan, ours))
    assert not list(plan.folder.glob(".tmp-*"))


def demonstrations_refused(tiny_model: Path, tmp_path: Path, file: Path, words: str) -> None:
    plan = make_plan(Settings(trainer=settings_for(tiny_model, tmp_path, demonstrations=file)))
    with pytest.raises(SettingsError, match=words):
        prepare(plan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "grpo", "best_share": 0.5}, r"trainer\.best_share has no effect"),
        ({"loss": "grpo", "demonstrations": "x"}, r"trainer\.demonstrations has no effect"),
        ({"correction": "truncate"}, "no ratio to correct"),
        ({"advantage": "mean_centred"}, "learns what was best"),
        ({"demonstrations": "x", "best_threshold": 0.5}, r"best_threshold has no effect with"),
    ],
)
def test_what_cannot_go_together_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        make_plan(Settings(trainer=settings_for(tiny_model, tmp_path, **changes)))


def test_passes_differ_and_are_the_same_again() -> None:
    assert order(20, 1, 0) == order(20, 1, 0)
    assert order(20, 1, 0) != order(20, 1, 1)
    assert sorted(order(20, 2, 3)) == list(range(20))


def test_settings_that_a_replay_takes_from_its_source_are_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    recorded = settings_for(tiny_model, tmp_path, loss="grpo", tasks="tests.streams.trainer_world:bandit").model_dump()
    make_plan(Settings(trainer=TrainerSettings.model_validate(recorded)))

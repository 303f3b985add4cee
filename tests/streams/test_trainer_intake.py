"""Which records of `trajectories` become dead letters, and that nobody writes one that is on the log already."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka.structs import ConsumerRecord

from fulgurite.schemas.codec import encode
from fulgurite.schemas.settings import Settings, SourceSettings, TrainerSettings
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.trainer.intake import Intake
from fulgurite.streams.trainer.naming import Naming
from fulgurite.streams.trainer.plan import make_plan
from fulgurite.streams.trainer.reader import Record
from fulgurite.streams.trainer.samples import ModelLimits
from fulgurite.streams.trainer.windows import Windows
from tests.streams.trainer_world import build_model

LIMITS = ModelLimits(vocab_size=16, max_positions=8)
LIVE = {"run_id": "r", "tasks": "tests.streams.trainer_world:bandit"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("intake") / "model")


def record(value: bytes, offset: int = 7) -> Record:
    return ConsumerRecord("trajectories", 0, offset, 0, 0, b"r-g0", value, None, 4, len(value), ())


def of_two_policies() -> bytes:
    """What actor and critic sampled in one rollout; the critic's tokens are none of its vocabulary."""
    actor = TokenSequence(token_ids=[1, 2], loss_mask=[0, 1], logprobs=[0.0, -1.0], resource="policy")
    critic = actor.model_copy(update={"token_ids": [1, 999], "resource": "critic"})
    return encode(
        Trajectory(
            rollout_id="r-g0-r0", run_id="r", group_id="r-g0", status="succeeded", reward=1.0, sequences=[actor, critic]
        )
    )


def letters(settings: Settings, value: bytes, buried: dict[int, int] | None = None) -> int:
    plan = make_plan(settings)
    intake = Intake(plan, LIMITS, Windows(plan.shape, asked=5), buried)
    intake.take_in(record(value), 0)
    return len(intake.take_dead_letters())


@pytest.mark.parametrize(
    ("trainer", "source", "bad_tokens", "not_json"),
    [
        (LIVE, {}, 0, 1),
        (LIVE | {"resource": "critic"}, {}, 1, 1),
        # The source run has its own policy's letters on the log, and those of records that nobody can read.
        ({"run_id": "shadow", "resource": "shadow"}, {"run_id": "r", "resource": "critic"}, 0, 0),
        ({"run_id": "second", "resource": "critic"}, {"run_id": "r", "resource": "critic"}, 1, 0),
    ],
)
def test_who_judges_tokens_first_writes_their_dead_letters(
    model: Path, trainer: dict[str, Any], source: dict[str, Any], bad_tokens: int, not_json: int
) -> None:
    settings = Settings(
        trainer=TrainerSettings.model_validate({"model": model, **trainer}),
        source=SourceSettings.model_validate(source),
    )
    assert letters(settings, of_two_policies()) == bad_tokens
    assert letters(settings, b"r-g0 is no JSON") == not_json


def test_what_an_earlier_life_has_written_is_not_written_again(model: Path) -> None:
    settings = Settings(trainer=TrainerSettings.model_validate({"model": model, **LIVE}))
    assert letters(settings, b"r: no JSON", {0: 8, 1: 0}) == 0
    assert letters(settings, b"r: no JSON", {0: 7}) == 1


async def test_letters_that_fill_up_are_written_between_versions_and_said_to_be(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a replay, too: its next step may be far."""
    monkeypatch.setattr("fulgurite.streams.trainer.intake.MAX_DEAD_LETTERS", 2)
    plan = make_plan(Settings(trainer=TrainerSettings.model_validate({"model": model, **LIVE})))
    intake = Intake(plan, LIMITS, Windows(plan.shape, asked=5))
    sent: list[tuple[range, int, dict[int, int]]] = []

    async def more(marker: Any, offsets: Any, groups: range, others: list[Any], buried: dict[int, int]) -> None:
        sent.append((groups, len(others), buried))

    run = SimpleNamespace(buried={}, marker=lambda: None, committed_offsets={})
    reader: Any = SimpleNamespace(offsets={0: 0})
    naming = Naming(plan, cast("Any", run), cast("Any", SimpleNamespace(more=more)), reader, intake, cast("Any", None))
    for offset in range(5):
        intake.take_in(record(b"r: no JSON", offset), 0)
        reader.offsets = {0: offset + 1}
        await naming.bury()
    assert sent == [(range(0), 3, {0: 3})]
    await naming.bury(range(5, 6))
    assert sent[1:] == [(range(5, 6), 0, {0: 3})]
    assert len(intake.dead_letters) == 2


def test_a_group_whose_records_cannot_be_decoded_is_not_waited_for_for_ever(model: Path) -> None:
    plan = make_plan(Settings(trainer=TrainerSettings.model_validate({"model": model, **LIVE, "group_size": 2})))
    windows = Windows(plan.shape, asked=5)
    intake = Intake(plan, LIMITS, windows)
    wrong_lengths = of_two_policies().replace(b'"loss_mask":[0,1]', b'"loss_mask":[0]')
    intake.take_in(record(wrong_lengths), 0)
    assert [member.reason for member in windows.groups[0].members.values()] == ["bad_record"]
    intake.take_in(record(b"r: no JSON", 8), 0)
    windows.close(windows.deadline_due(10**15))
    assert windows.take(1) is None
    assert {(d.rollout_id, d.reason) for d in windows.dropped} == {("r-g0-r0", "bad_record"), ("r-g0-r1", "deadline")}
    assert len(intake.take_dead_letters()) == 2


def test_what_is_another_runs_is_left_to_it(model: Path) -> None:
    plan = make_plan(Settings(trainer=TrainerSettings.model_validate({"model": model, **LIVE})))
    windows = Windows(plan.shape, asked=5)
    intake = Intake(plan, LIMITS, windows)
    theirs = (
        of_two_policies().replace(b'"loss_mask":[0,1]', b'"loss_mask":[0]').replace(b'"run_id":"r"', b'"run_id":"r2"')
    )
    intake.take_in(record(theirs), 0)
    intake.take_in(ConsumerRecord("trajectories", 0, 8, 0, 0, b"r2-g0", b"r2: no JSON", None, 5, 11, ()), 0)
    assert (windows.groups, intake.take_dead_letters()) == ({}, [])

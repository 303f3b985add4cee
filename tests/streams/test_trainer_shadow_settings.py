"""What a shadow takes of its source's settings, and that there is a word for taking nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.trainer.plan import check_together
from fulgurite.streams.trainer.source import fitting

Changes = dict[str, Any]
RUN: Changes = {"model": "start", "tasks": "tests.streams.trainer_world:bandit"}


def shadow_of(theirs: Changes, ours: Changes) -> TrainerSettings:
    """Of a source that may be, as the plan takes them."""
    source = TrainerSettings.model_validate({"run_id": "first"} | RUN | theirs)
    check_together(source)
    taken = source.model_dump(mode="json", exclude_defaults=True, exclude={"run_id", "tasks", *ours})
    own = {"run_id": "shadow", "resource": "shadow", **ours}
    trainer = fitting("first", taken, own)
    check_together(trainer)
    return trainer


@pytest.mark.parametrize(
    ("theirs", "ours", "left_out"),
    [
        ({"loss": "dr_grpo", "length_constant": 64}, {"loss": "gspo"}, {"length_constant"}),
        ({"loss": "grpo", "dual_clip": 3.0}, {"loss": "cispo"}, {"dual_clip"}),
        (
            {"correction": "mask", "importance_low": 0.5, "importance_gate": "sequence_mean"},
            {"correction": "clip"},
            {"importance_low", "importance_gate"},
        ),
        ({"credit": "discounted", "credit_discount": 0.9}, {"credit": "rollout"}, {"credit_discount"}),
        ({"kl_coefficient": 0.1, "kl_in_reward": True}, {"kl_coefficient": 0.0}, {"kl_in_reward"}),
        ({"kl_coefficient": 0.1, "kl_in_reward": True}, {"loss": "sft"}, {"kl_in_reward"}),
        ({"incomplete": "fill", "fill_reward": -1.0}, {"incomplete": "drop"}, {"fill_reward"}),
        ({"incomplete": "fill"}, {"loss": "sft"}, {"incomplete"}),
        ({"overlap_groups": 4, "overlap_seconds": 5.0}, {"overlap_groups": 0}, {"overlap_seconds"}),
        ({"overlap_groups": 4}, {"loss": "sft"}, {"overlap_groups"}),
    ],
)
def test_what_cannot_go_with_what_is_set_is_left_out_and_named(
    theirs: Changes, ours: Changes, left_out: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = shadow_of(theirs, ours)
    defaults = TrainerSettings()
    for name, value in theirs.items():
        wanted = ours.get(name, getattr(defaults, name) if name in left_out else value)
        assert getattr(trainer, name) == wanted
    assert {record.getMessage().split()[0] for record in caplog.records} == {f"trainer.{name}" for name in left_out}


@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        ({"loss": "gspo"}, {"correction": "truncate"}, r"trainer\.loss = gspo has no effect"),
        ({"loss": "cispo"}, {"dual_clip": 3.0}, r"trainer\.dual_clip = 3: trainer\.loss = cispo"),
        ({}, {"overlap_seconds": 5.0}, r"trainer\.overlap_seconds = 5"),
    ],
)
def test_neither_the_objective_nor_what_is_set_here_is_left_out(theirs: Changes, ours: Changes, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        shadow_of(theirs, ours)


def test_none_takes_a_setting_back() -> None:
    trainer = shadow_of({"clip_high": 0.4, "grad_norm_limit": 5.0}, {"grad_norm_limit": "none", "clip_low": "none"})
    assert (trainer.grad_norm_limit, trainer.clip_low, trainer.clip_high) == (None, None, 0.4)
    assert TrainerSettings(model=Path("./none")).model == Path("none")
    with pytest.raises(ValueError, match="valid integer"):
        TrainerSettings.model_validate({"steps": "none"})

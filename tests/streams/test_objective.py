"""The settings of the objective: names that exist, defaults of papers, and what cannot go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Settings, TrainerSettings, load_settings
from fulgurite.schemas.trainer_settings import AdvantageName, LossName, RatioLevel
from fulgurite.streams.objectives.advantages import ESTIMATORS
from fulgurite.streams.objectives.ratios import Level
from fulgurite.streams.objectives.recipes import POLICY_LOSSES, Clip
from fulgurite.streams.trainer.objective import check_objective, recipe_of
from fulgurite.streams.trainer.plan import make_plan

TASKS = "tests.streams.trainer_world:bandit"


def test_the_settings_know_every_name_and_no_other() -> None:
    assert set(get_args(LossName)) == set(POLICY_LOSSES)
    assert set(get_args(AdvantageName)) == {"recipe", *ESTIMATORS}
    assert get_args(RatioLevel) == get_args(Level)


def test_a_recipe_comes_whole_and_its_parts_are_replaced_one_by_one() -> None:
    assert recipe_of(TrainerSettings()).clip == Clip(0.2, 0.28)
    for name in POLICY_LOSSES:
        assert recipe_of(TrainerSettings.model_validate({"loss": name})) == POLICY_LOSSES[name]
    changed = recipe_of(TrainerSettings(loss="gspo", clip_high=0.3, advantage="mean_centred", aggregation="token_mean"))
    assert changed.surrogate == "sequence_clipped"
    assert (changed.clip, changed.advantage, changed.aggregation) == (Clip(3e-4, 0.3), "mean_centred", "token_mean")


def test_numbers_come_from_the_environment_too(tmp_path: Path) -> None:
    environment = {
        "FULGURITE_HOME": str(tmp_path),
        "FULGURITE_TRAINER__LOSS": "dr_grpo",
        "FULGURITE_TRAINER__LENGTH_CONSTANT": "64",
        "FULGURITE_TRAINER__CLIP_HIGH": "0.3",
        "FULGURITE_TRAINER__IMPORTANCE_GATE": "sequence_mean",
    }
    found = load_settings(environment).trainer
    assert (found.loss, found.length_constant, found.clip_high, found.importance_gate) == (
        "dr_grpo", 64, 0.3, "sequence_mean",
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "dr_grpo", "length_constant": 8},
        {"loss": "reinforce", "correction": "none"},
        {"correction": "mask", "importance_low": 0.5, "importance_gate": "sequence_mean"},
        {"loss": "grpo", "dual_clip": 3.0},
        {"loss": "ppo_dual_clip", "correction": "truncate", "minibatches": 2},
        {"loss": "gspo", "correction": "mask", "epochs": 2},
        {"kl_coefficient": 0.1, "model": "m"},
        {"kl_coefficient": 0.1, "kl_estimator": "k1", "kl_gradient": "k2", "model": "m"},
        {"overlong_buffer_tokens": 4, "overlong_max_tokens": 16},
        {"schedule": "cosine", "min_learning_rate_ratio": 0.1},
    ],
)
def test_what_goes_together(changes: dict[str, Any]) -> None:
    check_objective(TrainerSettings.model_validate(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "grpo", "advantage": "one"}, "trainer.advantage = one: .* no reward would count"),
        ({"loss": "gspo", "correction": "truncate"}, "trainer.loss = gspo has no effect .* set loss = grpo"),
        ({"loss": "ppo_dual_clip", "correction": "none"}, "trainer.loss = ppo_dual_clip has no effect .* loss = ppo"),
        ({"loss": "dr_grpo"}, "trainer.length_constant is not set: trainer.loss = dr_grpo"),
        ({"aggregation": "sequence_sum"}, "trainer.length_constant is not set"),
        ({"length_constant": 8}, "trainer.length_constant = 8: aggregation token_mean"),
        ({"dual_clip": 1.1}, "trainer.dual_clip = .*: a dual clip must lie above"),
        ({"loss": "cispo", "dual_clip": 9.0}, "trainer.loss = cispo has no dual clip"),
        ({"dual_clip": 3.0, "correction": "truncate"}, "trainer.dual_clip = 3 never acts"),
        ({"loss": "reinforce"}, "trainer.correction = clip: trainer.loss = reinforce has no ratio"),
        ({"correction": "truncate", "importance_gate": "token"}, "trainer.importance_gate = token"),
        ({"importance_level": "sequence_mean"}, "trainer.importance_level = sequence_mean"),
        ({"correction": "none", "importance_low": 0.5}, "trainer.importance_low = 0.5: .* none"),
        ({"correction": "mask", "importance_low": 1.2}, "must lie between them"),
        ({"correction": "truncate", "importance_cap": 0.5}, "must lie between them"),
        ({"kl_coefficient": 0.1, "kl_estimator": "k1"}, "trainer.kl_gradient = estimator: k1"),
        ({"kl_coefficient": 0.1}, "trainer.reference is empty, and so is trainer.model"),
        ({"kl_coefficient": 0.1, "reference": "/nowhere"}, "trainer.reference = /nowhere: no model there"),
        ({"overlong_buffer_tokens": 4}, "trainer.overlong_max_tokens is not set"),
        ({"overlong_buffer_tokens": 4, "overlong_max_tokens": 3}, "trainer.overlong_buffer_tokens = 4 is more than"),
        ({"loss": "reinforce_plus_plus", "incomplete": "fill"}, "trainer.incomplete = fill: .* counts by its tokens"),
        ({"schedule": "linear", "steps": 5, "warmup_steps": 5}, "trainer.warmup_steps = 5: .* trainer.steps = 5"),
    ],
)
def test_what_cannot_go_together_says_so_before_anything_is_loaded(changes: dict[str, Any], message: str) -> None:
    trainer = TrainerSettings.model_validate({"run_id": "r", "tasks": TASKS} | changes)
    with pytest.raises(SettingsError, match=message):
        make_plan(Settings(trainer=trainer))

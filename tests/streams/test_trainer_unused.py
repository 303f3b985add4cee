"""What is set and would do nothing is refused with its name and why; what is as by default never is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from examples.calculator.reproduce.cells import CELLS, Sizes
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Settings, SourceSettings, TrainerSettings
from fulgurite.streams.objectives.recipes import POLICY_LOSSES
from fulgurite.streams.trainer.objective import check_objective
from fulgurite.streams.trainer.plan import make_plan

SFT = {"loss": "sft"}
SHOWN = {**SFT, "demonstrations": "x"}
TRUNCATED = {"correction": "truncate"}
PENALISED = {"kl_coefficient": 0.1, "model": "m"}


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"loss": "reinforce", "correction": "none", "clip_low": 0.1}, "clip_low", "loss = reinforce has no ratio"),
        ({**SFT, "clip_high": 0.1}, "clip_high", "loss = sft has no ratio"),
        ({**TRUNCATED, "clip_high": 0.1}, "clip_high", "correction = truncate and one update a window"),
        ({"correction": "none", "clip_low": 0.1}, "clip_low", "correction = none and one update a window"),
        ({"importance_cap": 5.0}, "importance_cap", "correction = clip has no weights"),
        ({"correction": "none", "importance_cap": 5.0}, "importance_cap", "correction = none has no weights"),
        ({**SFT, "importance_cap": 5.0}, "importance_cap", "loss = sft"),
        ({**SFT, "importance_level": "sequence_mean"}, "importance_level", "loss = sft"),
        ({"lora_alpha": 16.0}, "lora_alpha", "lora_rank is 0"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules", "lora_rank is 0"),
        ({"min_learning_rate_ratio": 0.1}, "min_learning_rate_ratio", "schedule = constant does not fall"),
        ({"kl_estimator": "k2"}, "kl_estimator", "kl_coefficient is 0"),
        ({"kl_gradient": "ratio"}, "kl_gradient", "kl_coefficient is 0"),
        ({"reference": "m"}, "reference", "kl_coefficient is 0"),
        ({"overlong_penalty": 0.5}, "overlong_penalty", "overlong_buffer_tokens is 0"),
        ({"overlong_max_tokens": 64}, "overlong_max_tokens", "overlong_buffer_tokens is 0"),
        ({**SFT, "overlong_buffer_tokens": 4, "overlong_max_tokens": 64}, "overlong_buffer_tokens", "loss = sft"),
        ({**SHOWN, "overlap_groups": 2}, "overlap_groups", "there are no rollouts"),
        ({**SHOWN, "incomplete": "drop"}, "incomplete", "there are no rollouts"),
        ({**SHOWN, "agents": ["a"]}, "agents", "there are no rollouts"),
        ({**SHOWN, "window_seconds": 5.0}, "window_seconds", "there are no rollouts"),
        ({**SHOWN, "group_size": 4}, "group_size", "there are no rollouts"),
        ({**SHOWN, "group_deadline_seconds": 3.0}, "group_deadline_seconds", "there are no rollouts"),
        ({**SHOWN, "max_staleness": 9}, "max_staleness", "there are no rollouts"),
        ({**SHOWN, "pacing_staleness": 0}, "pacing_staleness", "there are no rollouts"),
        ({**SHOWN, "zero_variance": "keep"}, "zero_variance", "there are no rollouts"),
        ({**SHOWN, "agent": "a"}, "agent", "there are no rollouts"),
        ({**SHOWN, "max_logprob_difference": 0.1}, "max_logprob_difference", "there are no rollouts"),
        ({**SHOWN, "sampling_parameters": {"max_tokens": 3}}, "sampling_parameters", "there are no rollouts"),
        ({**SHOWN, "rollout_timeout_seconds": 3.0}, "rollout_timeout_seconds", "there are no rollouts"),
    ],
)
def test_what_would_do_nothing_is_refused(changes: dict[str, Any], name: str, why: str) -> None:
    with pytest.raises(SettingsError, match=rf"trainer\.{name} has no effect: .*{why}"):
        check_objective(TrainerSettings.model_validate(changes))


@pytest.mark.parametrize(
    "source", [{"run_id": "first", "resource": "p"}, {"begin": "sql", "sql": "S", "resource": "p"}]
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tasks", "no.such:thing"),
        ("agent", "a"),
        ("sampling_parameters", {"max_tokens": 3}),
        ("rollout_timeout_seconds", 3.0),
        ("group_deadline_seconds", 3.0),
        ("lost_after_seconds", 3.0),
        ("pacing_staleness", 0),
    ],
)
def test_what_asks_for_rollouts_is_refused_where_they_are_anothers(
    tmp_path: Path, source: dict[str, str], name: str, value: Any
) -> None:
    (tmp_path / "config.json").write_text("{}")
    own = {"run_id": "shadow", "resource": "shadow", "model": tmp_path}

    def plan(changes: dict[str, Any]) -> None:
        trainer = TrainerSettings.model_validate(own | changes)
        make_plan(Settings(trainer=trainer, source=SourceSettings.model_validate(source)))

    plan({name: TrainerSettings.model_fields[name].get_default(call_default_factory=True)})
    with pytest.raises(SettingsError, match=rf"trainer\.{name} has no effect: a run on another one's rollouts"):
        plan({name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_low": 0.1, "clip_high": 0.1},
        {**TRUNCATED, "clip_high": 0.1, "epochs": 2},
        {**TRUNCATED, "importance_cap": 5.0},
        {"correction": "mask", "importance_cap": 5.0},
        {"lora_rank": 8, "lora_alpha": 16.0, "lora_target_modules": ["q_proj"]},
        {"schedule": "linear", "min_learning_rate_ratio": 0.1},
        {**PENALISED, "kl_estimator": "k2", "reference": "m"},
        {**PENALISED, "kl_estimator": "k1", "kl_in_reward": True},
        {"overlong_buffer_tokens": 4, "overlong_max_tokens": 64, "overlong_penalty": 0.5},
        {**SFT, "incomplete": "drop", "agents": ["a"], "window_seconds": 5.0},
    ],
)
def test_what_does_something_is_not(changes: dict[str, Any]) -> None:
    check_objective(TrainerSettings.model_validate(changes))


@pytest.mark.parametrize("name", [n for n, f in TrainerSettings.model_fields.items() if "float" in str(f.annotation)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan"), float("inf")])
def test_numbers_are_finite(name: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        TrainerSettings.model_validate({name: value})


@pytest.mark.parametrize("name", ["steps", "seed", "learning_rate", "lora_rank", "best_threshold"])
def test_a_switch_is_no_number(name: str) -> None:
    with pytest.raises(ValidationError, match="this is no switch"):
        TrainerSettings.model_validate({name: True})


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_a_record_of_all_settings_is_none_of_it(loss: str) -> None:
    """Every one of them counts as set there, as in the settings of a checkpoint."""
    needed = {"dr_grpo": {"length_constant": 8}, "reinforce": {"correction": "none"}}.get(loss, {})
    settings = TrainerSettings.model_validate({"loss": loss, **needed})
    check_objective(TrainerSettings.model_validate(settings.model_dump()))


def test_what_is_shipped_sets_nothing_in_vain(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for cell in CELLS:
        trainer = cell.settings(1, Sizes(), tmp_path, tmp_path)
        tasks = {"tasks": "tests.streams.trainer_world:bandit"}
        make_plan(Settings(trainer=trainer.model_copy(update=tasks)))


def test_a_penalty_weighed_by_a_ratio_needs_a_sampler() -> None:
    settings = TrainerSettings.model_validate({**SHOWN, **PENALISED, "kl_gradient": "ratio"})
    with pytest.raises(SettingsError, match=r"kl_gradient = ratio: demonstrations were sampled by nobody"):
        check_objective(settings)

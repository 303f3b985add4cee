"""`fulgurite train`: its help says every setting, and --shadow stands for settings."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fulgurite.infra.cli import app
from fulgurite.infra.cli_train import groups, shadow_sets
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import SourceSettings, TrainerSettings
from fulgurite.schemas.trainer_settings import GROUPS


def test_help_lists_every_setting_with_its_meaning_and_what_may_be_chosen() -> None:
    done = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    names = [f"trainer.{name}" for name in TrainerSettings.model_fields]
    names += [f"source.{name}" for name in SourceSettings.model_fields]
    assert [name for name in names if f" {name} " not in done.output] == []
    for title in GROUPS:
        assert title in done.output
    text = " ".join(done.output.split())
    assert "Rollouts with a token more versions behind are dropped." in text
    assert "ppo_dual_clip" in text
    assert all(fields for _, _, fields in groups())
    assert sum(len(fields) for _, section, fields in groups() if section == "trainer") == len(
        TrainerSettings.model_fields
    )


def test_a_shadow_has_a_name_and_a_resource_of_its_own() -> None:
    assert shadow_sets("", ["trainer.loss=gspo"]) == ["trainer.loss=gspo"]
    assert shadow_sets("first", ["trainer.loss=gspo"]) == [
        "source.run_id=first", "trainer.run_id=first-shadow", "trainer.resource=first-shadow", "trainer.loss=gspo",
    ]  # fmt: skip
    named = shadow_sets("first", ["trainer.run_id=mine", "trainer.resource=other"])
    assert named[1:3] == ["trainer.run_id=mine", "trainer.resource=mine"]
    assert named[-1] == "trainer.resource=other", "what is given comes last, and wins"
    with pytest.raises(SettingsError, match="give one of them"):
        shadow_sets("first", ["source.run_id=second"])

"""What a run needs around it is looked at before Kafka is waited for and before a model is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.streams.trainer import serve
from fulgurite.streams.trainer.plan import make_plan

TASKS = "tests.streams.trainer_world:bandit"
TORCHRUN = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def plan(**changes: Any) -> None:
    make_plan(Settings(trainer=TrainerSettings.model_validate({"run_id": "r", "tasks": TASKS} | changes)))


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def launched(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    for name, value in {**TORCHRUN, "WORLD_SIZE": str(ranks)}.items():
        monkeypatch.setenv(name, value)


def test_zero_without_torchrun_says_how_to_start_it() -> None:
    with pytest.raises(SettingsError, match=r"zero_stage = 2 .*torchrun --nproc-per-node N -m fulgurite\.infra train"):
        plan(zero_stage=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_under_torchrun_is_accepted(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    launched(monkeypatch, ranks)
    plan(zero_stage=1)


def test_several_processes_that_would_all_train_everything_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 1)
    plan()
    launched(monkeypatch, 2)
    with pytest.raises(SettingsError, match=r"zero_stage = 0 .*torchrun started 2 processes .*set trainer\.zero_stage"):
        plan()


async def test_a_model_that_is_not_there_is_told_although_kafka_is_away() -> None:
    trainer = TrainerSettings(run_id="r", tasks=TASKS, model=Path("/nowhere"))
    settings = Settings(kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1"), trainer=trainer)
    async with asyncio.timeout(10):
        with pytest.raises(SettingsError, match=r"trainer\.model = /nowhere: no model there \(a folder with config"):
            await serve(settings, asyncio.Event())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"trainer\.model = .*: no model there"):
        plan(model=tmp_path)
    model = model_in(tmp_path / "model")
    with pytest.raises(SettingsError, match=r"trainer\.reference = .*: no model there"):
        plan(model=model, reference=tmp_path, kl_coefficient=0.1)
    plan(model=model, reference=model, kl_coefficient=0.1)


def test_a_run_that_goes_on_needs_its_start_model_only_where_it_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "r" / "v000003").mkdir(parents=True)
    plan(model="/nowhere", output=tmp_path)
    for changes in ({"lora_rank": 8}, {"kl_coefficient": 0.1}):
        with pytest.raises(SettingsError, match=r"trainer\.model = /nowhere: no model there"):
            plan(model="/nowhere", output=tmp_path, **changes)


def test_an_output_that_cannot_be_a_folder_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "policy"):
        with pytest.raises(SettingsError, match=r"trainer\.output = .*file is a file; name a folder"):
            plan(output=output)
    plan(output=tmp_path / "not" / "there" / "yet", model=model_in(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "value"), [("resource", "my policy"), ("resource", "x" * 129), ("agent", "a" * 513)], ids=str
)
def test_a_name_that_no_event_could_carry_is_no_setting(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name):
        TrainerSettings.model_validate({name: value})

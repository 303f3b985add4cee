"""What a run needs around it, looked at before anything is loaded: its processes, where it writes, folders with models.
No torch.

Does not know Kafka: what the log alone can tell is looked at when there is one.
"""

from __future__ import annotations

import os
from pathlib import Path

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.launch import is_launched, launched_ranks

_LAUNCH = "torchrun --nproc-per-node N -m fulgurite.infra train …"


def check_surroundings(trainer: TrainerSettings) -> None:
    """Raises SettingsError, naming the setting and what to do."""
    _check_processes(trainer)
    _check_output(trainer.output)
    if trainer.kl_coefficient and trainer.reference is not None:
        _check_model("reference", trainer.reference)
    if trainer.model is not None and (_is_needed(trainer) or not _has_begun(trainer)):
        _check_model("model", trainer.model)


def _check_processes(trainer: TrainerSettings) -> None:
    if trainer.zero_stage and not is_launched():
        raise SettingsError(
            f"trainer.zero_stage = {trainer.zero_stage} divides training over processes that torchrun starts, and this "
            f"one was not started by it: start it as {_LAUNCH} (N may be 1), or set trainer.zero_stage = 0"
        )
    if not trainer.zero_stage and launched_ranks() > 1:
        raise SettingsError(
            f"trainer.zero_stage = 0 is plain torch on one device, but torchrun started {launched_ranks()} processes "
            "(WORLD_SIZE), each of which would train on everything: set trainer.zero_stage to 1, 2 or 3, or start one "
            "process without torchrun"
        )


def _check_output(folder: Path) -> None:
    """Made where it is not there; nothing is made yet."""
    there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise SettingsError(f"trainer.output = {folder}: {there} is a file; name a folder for checkpoints and versions")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingsError(f"trainer.output = {folder}: {there} cannot be written by this user; name another folder")


def _is_needed(trainer: TrainerSettings) -> bool:
    """Whether a run that goes on reads its start model again."""
    return bool(trainer.lora_rank) or (trainer.kl_coefficient > 0 and trainer.reference is None)


def _has_begun(trainer: TrainerSettings) -> bool:
    """Whether there are checkpoints: a run goes on from its last version, also where the start model is gone."""
    return any((trainer.output / trainer.run_id).glob("v*"))


def _check_model(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise SettingsError(f"trainer.{name} = {folder}: no model there (a folder with config.json is needed)")

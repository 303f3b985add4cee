"""What a run is, checked before anything heavy is loaded: settings that cannot work end the process in a second."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Settings, TrainerSettings
from fulgurite.schemas.topics import TRAJECTORIES
from fulgurite.streams.trainer.objective import check_objective
from fulgurite.streams.trainer.tasks import TaskFunction, load_tasks
from fulgurite.streams.trainer.windows import Shape

MAX_RUN_ID_CHARS = 64
"""Rollout and event ids are made of it and must stay below 128."""


@dataclass(frozen=True, slots=True)
class Plan:
    settings: Settings
    shape: Shape
    tasks: TaskFunction
    start_model: Path | None

    @property
    def trainer(self) -> TrainerSettings:
        return self.settings.trainer

    @property
    def run_id(self) -> str:
        return self.shape.run_id

    @property
    def topic(self) -> str:
        return self.settings.kafka.topic(TRAJECTORIES)

    @property
    def name(self) -> str:
        """Consumer group and transactional id. The id names the run, and a run's trainer reads all partitions: whoever
        starts the run again fences whoever ran it before."""
        return f"{self.settings.kafka.topic_prefix}trainer.{self.run_id}"


def make_plan(settings: Settings) -> Plan:
    """Raises SettingsError for what cannot work."""
    trainer = settings.trainer
    run_id = trainer.run_id
    if not run_id:
        # A name made up here would be another one after every restart: a run from the start model each time.
        raise SettingsError(
            "trainer.run_id is empty: name the run, trainer.run_id = NAME; a restart with the same name goes on where "
            "it stood"
        )
    if len(run_id) > MAX_RUN_ID_CHARS or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id):
        raise SettingsError(
            f"trainer.run_id = {run_id!r}: at most {MAX_RUN_ID_CHARS} letters, digits, dots, dashes and underscores"
        )
    for name, neutral in (("temperature", 1), ("top_p", 1), ("top_k", -1)):
        value = trainer.sampling_parameters.get(name, neutral)
        if value != neutral and not (name == "top_k" and value == 0):
            raise SettingsError(
                f"trainer.sampling_parameters: {name} = {value!r}; it must be {neutral}, otherwise the recorded "
                "logprobs are not the policy's"
            )
    check_objective(trainer)
    if trainer.kl_coefficient and trainer.reference and not (trainer.reference / "config.json").is_file():
        raise SettingsError(
            f"trainer.reference = {trainer.reference}: no model there (a folder with config.json is needed)"
        )
    shape = Shape(
        run_id=run_id,
        group_size=trainer.group_size,
        groups_per_step=trainer.groups_per_step,
        groups_ahead=(trainer.pacing_staleness + 1) * trainer.groups_per_step,
        max_staleness=trainer.max_staleness,
        group_deadline_seconds=trainer.group_deadline_seconds,
    )
    if trainer.pacing_staleness > trainer.max_staleness:
        raise SettingsError(
            f"trainer.pacing_staleness = {trainer.pacing_staleness} lets rollouts run further ahead than "
            f"trainer.max_staleness = {trainer.max_staleness} lets them be used"
        )
    return Plan(settings, shape, load_tasks(trainer.tasks), trainer.model)

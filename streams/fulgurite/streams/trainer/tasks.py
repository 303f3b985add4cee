"""Tasks: the user's function, and the records that ask runners for a group of rollouts. Torch-free.

Task `index` of a run is group `index`: ids follow from the run and the index alone, so that asking again after a crash
asks for the same rollouts, and creating a rollout twice is idempotent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fulgurite.producers.named_objects import load_object
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.rollouts import RolloutConfig, RolloutQueued
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.trainer.windows import Shape

TaskFunction = Callable[[int], Any]


def load_tasks(spec: str, where: str = "trainer.tasks") -> TaskFunction:
    """The function `module:function` names. Raises SettingsError: what is wrong and what is expected."""
    found = load_object(spec, where, "examples.calculator.tasks:train_task")
    if not callable(found):
        raise SettingsError(f"{where} = {spec!r}: no function; function(index) gives the input of task `index`")
    task: TaskFunction = found
    return task


def task_input(tasks: TaskFunction, index: int) -> Any:
    """The input of task `index`. Raises SettingsError where the function does, or gives what is not JSON-able: it has
    to cross Kafka."""
    try:
        value = tasks(index)
    except Exception as error:  # whatever a user's function raises
        raise SettingsError(
            f"the task function raised {error!r} for task {index}: it is asked for tasks 0, 1, 2, … without an end; of "
            "a list give element index % len(list)"
        ) from error
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"task {index} is a {type(value).__name__} that is no JSON: {error}") from error
    return value


def group_records(settings: TrainerSettings, shape: Shape, tasks: TaskFunction, index: int) -> list[RolloutQueued]:
    """Asks for the rollouts of one group."""
    value = task_input(tasks, index)
    config = RolloutConfig(
        timeout_seconds=settings.rollout_timeout_seconds, sampling_parameters=settings.sampling_parameters
    )
    return [
        RolloutQueued(
            event_id=f"{rollout_id}-queued",
            rollout_id=rollout_id,
            run_id=shape.run_id,
            task_id=f"task-{index}",
            group_id=shape.group_id(index),
            group_size=shape.group_size,
            mode="train",
            agent=settings.agent,
            input=value,
            config=config,
        )
        for rollout_id in shape.rollout_ids(index)
    ]

"""One cell on one seed: the trainer's windows, advantages, losses and learner in one process, one thread.

    tasks ─► Sampler (version v - lag) ─► Windows ─► training_set ─► Learner ─► version v + 1 ─► Sampler

The same code as `fulgurite train` but for what carries the records: no Kafka, no gateway, no runner. What that takes
away is chance: how old a rollout is follows from the cell, not from the machine's speed, which is what an ablation of
staleness needs. The same cell, seed and machine give the same result, bit for bit.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.calculator.reproduce.cells import Cell, Sizes, key
from examples.calculator.reproduce.rollouts import Asked, Sampler
from examples.calculator.tasks import Task, heldout_task, train_task
from examples.calculator.warm_start import Recipe, warm_start
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.learners.learner import Learner, StepResult, load_learner
from fulgurite.streams.trainer.checkpoints import copy_companions
from fulgurite.streams.trainer.samples import ModelLimits, member_of, read_limits, training_set
from fulgurite.streams.trainer.window_metrics import staleness
from fulgurite.streams.trainer.windows import Shape, Window, Windows

TASKS_OF_A_SEED = 1_000_000
"""Training tasks of seed s begin with index s times this."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """After `step` steps: what the rollouts of that step earned, and now and then held-out tasks."""

    step: int
    reward: float | None
    """Of the step's training rollouts, sampled before it; None at step 0."""
    heldout: float | None
    """Mean reward of held-out tasks, sampled at temperature 1; None where it was not measured."""
    tool_use: float | None
    staleness: float
    mismatch_kl: float
    effective_sample_size: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """A finished cell."""

    cell: str
    seed: int
    points: list[Point]
    seconds: float

    @property
    def heldout(self) -> list[tuple[int, float]]:
        return [(point.step, point.heldout) for point in self.points if point.heldout is not None]


def finished(folder: Path, cell: Cell, seed: int, sizes: Sizes) -> Result | None:
    """The result that is kept of this cell, None where there is none."""
    path = folder / f"{_key(cell, seed, sizes)}.json"
    if not path.is_file():
        return None
    fields: dict[str, Any] = json.loads(path.read_text())
    return Result(fields["cell"], fields["seed"], [Point(**point) for point in fields["points"]], fields["seconds"])


def start_model(folder: Path, seed: int, sizes: Sizes, progress: Progress) -> Path:
    """What all cells of a seed begin with; made once."""
    torch.set_num_threads(1)
    recipe = _recipe(seed, sizes)
    model = folder / f"start-{seed}-{recipe.steps}-{recipe.manifest()['format']}"
    warm_start(model, recipe, lambda *at: progress(f"warm start {at[0]}/{at[1]}"))
    return model


def run_cell(folder: Path, cell: Cell, seed: int, sizes: Sizes, progress: Progress) -> Result:
    """Trains and keeps the result: complete or not there."""
    model = start_model(folder, seed, sizes, progress)
    began = time.monotonic()
    work = folder / f"{_key(cell, seed, sizes)}.work"
    shutil.rmtree(work, ignore_errors=True)
    run = _Run(cell, seed, sizes, cell.settings(seed, sizes, model, work))
    points = [run.start()]
    for step in range(1, sizes.steps + 1):
        points.append(run.step(step))
        at = points[-1]
        measured = "" if at.heldout is None else f", held-out {at.heldout:.3f}"
        progress(f"step {step}/{sizes.steps}, reward {at.reward or 0.0:.3f}{measured}")
    result = Result(cell.name, seed, points, time.monotonic() - began)
    path = folder / f"{_key(cell, seed, sizes)}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result)))
    temporary.rename(path)
    shutil.rmtree(work)
    return result


def _recipe(seed: int, sizes: Sizes) -> Recipe:
    return Recipe(steps=sizes.warm_start_steps, seed=seed)


def _key(cell: Cell, seed: int, sizes: Sizes) -> str:
    return key(cell, seed, sizes, _recipe(seed, sizes).manifest())


class _Run:
    def __init__(self, cell: Cell, seed: int, sizes: Sizes, settings: TrainerSettings) -> None:
        assert settings.model
        self._cell = cell
        self._seed = seed
        self._sizes = sizes
        self._settings = settings
        self._model: Path = settings.model
        self._limits: ModelLimits = read_limits(self._model)
        self._learner: Learner = load_learner(self._model, settings)
        self._sampler = Sampler(settings.run_id, cell.rewarded)
        self._windows = Windows(
            Shape(
                run_id=settings.run_id,
                group_size=settings.group_size,
                groups_per_step=settings.groups_per_step,
                groups_ahead=settings.groups_per_step,
                max_staleness=settings.max_staleness,
                group_deadline_seconds=settings.group_deadline_seconds,
            )
        )

    def start(self) -> Point:
        """The model as it is before any training, version 1."""
        self._sampler.add(1, self._model, self._cell.lag + 1)
        heldout, tool_use = self._evaluate(1)
        return Point(0, None, heldout, tool_use, 0.0, 0.0, 1.0, 0)

    def step(self, step: int) -> Point:
        """Version `step` becomes version `step` + 1, from rollouts of the one `lag` before it."""
        sampling = max(1, step - self._cell.lag)
        for trajectory in self._rollouts(step, sampling):
            member, fault = member_of(trajectory, self._settings.resource, self._limits)
            assert not fault, fault
            self._windows.add(member, 0)
        window = self._windows.take(step)
        assert window, "all rollouts of a step end"
        rewards = [m.trajectory.reward or 0.0 for group in window.groups for m in group]
        training, result = self._train(window)
        self._publish(step + 1)
        measured = step % self._sizes.evaluate_every == 0 or step == self._sizes.steps
        heldout, tool_use = self._evaluate(step + 1) if measured else (None, None)
        metrics = result.metrics if result else {}
        return Point(
            step=step,
            reward=sum(rewards) / len(rewards),
            heldout=heldout,
            tool_use=tool_use,
            staleness=training,
            mismatch_kl=metrics.get("rollout_corr/k3_kl", 0.0),
            effective_sample_size=metrics.get("sampling/effective_sample_size", 1.0),
            tokens=result.tokens if result else 0,
        )

    def _train(self, window: Window) -> tuple[float, StepResult | None]:
        training = training_set(window, self._settings)
        behind, _ = staleness(training, window)
        if not training.samples:
            return behind, None
        return behind, self._learner.step(training.samples, window.version_in, training.compared)

    def _rollouts(self, step: int, version: int) -> list[Trajectory]:
        shape = self._windows.shape
        first = self._windows.asked
        self._windows.asked += shape.groups_per_step
        # Cells of other group sizes get the same tasks: the index counts tasks, not groups of a size.
        asked = [
            Asked(rollout_id, shape.group_id(index), self._tasks(index))
            for index in range(first, self._windows.asked)
            for rollout_id in shape.rollout_ids(index)
        ]
        return self._sampler.rollouts(version, asked, shape.group_size)

    def _tasks(self, group: int) -> tuple[Task, ...]:
        first = self._seed * TASKS_OF_A_SEED + group * self._cell.problems
        return tuple(train_task(first + problem) for problem in range(self._cell.problems))

    def _evaluate(self, version: int) -> tuple[float, float]:
        asked = [
            Asked(f"val-{self._seed}-{version}-{index}", f"val-{index}", (heldout_task(index),))
            for index in range(self._sizes.heldout_tasks)
        ]
        found = self._sampler.rollouts(version, asked, 1)
        gc.collect()  # old policies lie in cycles, and next to torch's objects Python hardly ever looks for them
        return (
            sum(trajectory.reward or 0.0 for trajectory in found) / len(found),
            sum(trajectory.calls > 1 for trajectory in found) / len(found),
        )

    def _publish(self, version: int) -> None:
        folder = self._settings.output / f"v{version}"
        folder.mkdir(parents=True)
        self._learner.save_weights(folder)
        copy_companions(self._model, folder)
        self._sampler.add(version, folder, self._cell.lag + 1)
        shutil.rmtree(folder)

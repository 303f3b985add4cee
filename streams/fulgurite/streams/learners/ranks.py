"""Many processes, one learner: rank 0 is asked by the trainer, the others do the same at the same time.

    trainer ─► Lead (rank 0) ── step, save_weights, save_state, stop ──► follow (ranks 1…)        over gloo

Promises: only rank 0 knows Kafka, so no rebalance can meet a step; every rank does every command, in one order; a rank
that fails in a way the others do not know of ends, and torchrun then ends all of them: the trainer starts again from
the last committed version. Does not know what the commands compute.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import torch.distributed as dist

from fulgurite.schemas.errors import LogprobMismatch
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.deepspeed_engine import start_processes
from fulgurite.streams.learners.learner import BadStep, Learner, StepResult, load_learner
from fulgurite.streams.trainer.sample import Sample

logger = logging.getLogger(__name__)

WAIT: Final = timedelta(days=30)
"""Longest that a rank waits for the next command: a window may take hours. A rank 0 that died is noticed at once."""


class AnyLearner(Protocol):
    """What the trainer asks of a learner."""

    def step(
        self, samples: list[Sample], version_in: int, compared: Sequence[Sample] = (), is_mismatched: bool = False
    ) -> StepResult: ...
    def save_weights(self, folder: Path) -> None: ...
    def save_state(self, path: Path) -> None: ...
    def reference_sha256(self) -> str: ...
    def close(self) -> None: ...


class Lead:
    """Rank 0's learner. Not to be asked from two threads at once."""

    def __init__(self, folder: Path, settings: TrainerSettings, state: Path | None) -> None:
        """See load_learner. The other ranks load the same."""
        self._group = _group()
        self._tell("load", folder, settings, state)
        self._learner = load_learner(folder, settings, state)

    def step(
        self, samples: list[Sample], version_in: int, compared: Sequence[Sample] = (), is_mismatched: bool = False
    ) -> StepResult:
        self._tell("step", samples, version_in, compared, is_mismatched)
        return self._learner.step(samples, version_in, compared, is_mismatched)

    def save_weights(self, folder: Path) -> None:
        self._tell("save_weights", folder)
        self._learner.save_weights(folder)

    def save_state(self, path: Path) -> None:
        self._tell("save_state", path)
        self._learner.save_state(path)

    def reference_sha256(self) -> str:
        return self._learner.reference_sha256()  # the same on every rank

    def close(self) -> None:
        self._tell("close")
        dist.destroy_process_group()

    def _tell(self, command: str, *arguments: Any) -> None:
        dist.broadcast_object_list([(command, arguments)], src=0, group=self._group)


def dismiss() -> None:
    """On rank 0, where there is nothing to train: the other ranks end."""
    dist.broadcast_object_list([("close", ())], src=0, group=_group())
    dist.destroy_process_group()


def follow() -> None:
    """What ranks 1… do, until rank 0 closes. The settings are rank 0's: a replay's come from its source, too."""
    group = _group()
    learner: Learner | None = None
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=group)
        command, arguments = told[0]
        if command == "close":
            dist.destroy_process_group()
            return
        if command == "load":
            folder, settings, state = arguments
            learner = load_learner(folder, settings, state)
            continue
        try:
            getattr(learner, command)(*arguments)
        except (LogprobMismatch, BadStep) as error:
            # Refused on every rank alike; what follows from it rank 0 decides.
            logger.info("%s: %s", command, error)


def _group() -> Any:
    start_processes()
    return dist.new_group(backend="gloo", timeout=WAIT)

"""Where steps are written to: TensorBoard's event files, Weights & Biases. Each needs its package.

A step written twice counts once. TensorBoard hides what an earlier life wrote from the first step on; W&B takes no step
below its newest. Without a network W&B collects in ./wandb (WANDB_MODE=offline); `wandb sync` sends it later.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.training import RunStarted, TrainingStep, scalars


class Writer(Protocol):
    def begin(self, event: RunStarted) -> None:
        """Before the first step; again when the run goes on after a restart."""
        ...

    def write(self, event: TrainingStep) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """One folder a run."""

    def __init__(self, folder: Path, run_id: str) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise SettingsError("--tensorboard needs its package: pip install 'fulgurite[tensorboard]'") from None
        events: Any = event_pb2
        self._events, self._summaries = events, summary_pb2
        self._writer: Any = EventFileWriter(str(folder / run_id))
        # What is in the folder from this step on is another life's.
        log = events.SessionLog(status=events.SessionLog.START)
        self._writer.add_event(events.Event(wall_time=time.time(), step=1, session_log=log))

    def begin(self, event: RunStarted) -> None:
        pass

    def write(self, event: TrainingStep) -> None:
        values = [self._summaries.Summary.Value(tag=tag, simple_value=v) for tag, v in scalars(event).items()]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=event.time_ns / 1e9, step=event.step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run a run, of the same id."""

    def __init__(self, project: str, run_id: str) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # not among the packages of the tests
        except ImportError:
            raise SettingsError("--wandb needs its package: pip install 'fulgurite[wandb]'") from None
        self._run: Any = wandb.init(project=project, id=run_id, name=run_id, resume="allow")
        self._newest = int(self._run.step) - 1

    def begin(self, event: RunStarted) -> None:
        self._run.config.update(event.config, allow_val_change=True)

    def write(self, event: TrainingStep) -> None:
        if event.step > self._newest:
            self._run.log(scalars(event), step=event.step)

    def close(self) -> None:
        self._run.finish()

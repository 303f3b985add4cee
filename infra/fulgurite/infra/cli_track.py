"""`fulgurite track`: a run's steps in TensorBoard or Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fulgurite.infra.cli_common import DataOption, SetOption, lazy_module, next_steps, read_settings, register


def add_to(app: typer.Typer) -> None:
    register(app, "track", "fulgurite track first --tensorboard ./tensorboard", rich_help_panel="Services")(track)


def track(
    run_id: Annotated[str, typer.Argument(help="The run, as in trainer.run_id.")],
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    wandb: Annotated[str | None, typer.Option(help="Project of Weights & Biases.")] = None,
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Write a run's steps to TensorBoard or Weights & Biases, from its first step until it is over."""
    settings = read_settings(data, sets)
    code = int(lazy_module("fulgurite.consumers.tracking").main(settings, run_id, tensorboard, wandb))
    if tensorboard is not None and code == 0:
        next_steps(f"tensorboard --logdir {tensorboard}")
    return code

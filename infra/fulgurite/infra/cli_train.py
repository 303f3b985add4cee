"""`fulgurite train`: a run, or with --shadow a run on another one's rollouts. Its help lists every setting it reads.

The settings' meanings are those of the classes in `fulgurite.schemas`: told once, shown here and in docs/reference.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from fulgurite.infra.cli_common import DataOption, SetOption, console, register, start_service
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import SourceSettings, TrainerSettings
from fulgurite.schemas.trainer_settings import GROUPS

EXAMPLE = (
    "fulgurite train --set trainer.run_id=first --set trainer.model=./model "
    "--set trainer.tasks=examples.calculator.tasks:train_task"
)

Fields = Mapping[str, FieldInfo]


class TrainCommand(TyperCommand):
    """Its help ends with the settings, by group."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        for title, prefix, fields in groups():
            console.print(_table(title, prefix, fields))
        console.print(
            "Each may be given as --set NAME=VALUE, as the environment's FULGURITE_SECTION__NAME, or in fulgurite.toml "
            "(section and name), in this order. A list or a table is JSON in the first two.",
            soft_wrap=True,
        )


def add_to(app: typer.Typer) -> None:
    """Registers it."""
    register(app, "train", EXAMPLE, rich_help_panel="Services", cls=TrainCommand)(train)


def train(
    shadow: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="Train on this run's rollouts, as they come or from the log, and ask for none. Settings that are not "
            "given are that run's; its own name is RUN-shadow, its resource is named after it.",
        ),
    ] = "",
    data: DataOption = None,
    sets: SetOption = None,
) -> int:
    """Trains the policy online on trajectories and publishes its versions."""
    return start_service("train", "fulgurite.streams.trainer", data, shadow_sets(shadow, sets or []))


def shadow_sets(shadow: str, sets: list[str]) -> list[str]:
    """--shadow RUN as the settings it stands for; those given by --set come after, and so they win."""
    if not shadow:
        return sets
    given = {name.strip(): value for name, _, value in (text.partition("=") for text in sets)}
    if given.get("source.run_id", shadow) != shadow:
        raise SettingsError(f"--shadow {shadow} and --set source.run_id={given['source.run_id']}: give one of them")
    run_id = given.get("trainer.run_id", f"{shadow}-shadow")
    return [
        f"source.run_id={shadow}",
        f"trainer.run_id={run_id}",
        f"trainer.resource={run_id}",
        *sets,
    ]


def groups() -> list[tuple[str, str, Fields]]:
    """Title, section and fields of each group of settings, in the order of the classes."""
    found: list[tuple[str, str, dict[str, FieldInfo]]] = []
    titles = {first: title for title, first in GROUPS.items()}
    for name, field in TrainerSettings.model_fields.items():
        if name in titles:
            found.append((titles[name], "trainer", {}))
        found[-1][2][name] = field
    return [*found, ("Another run's rollouts", "source", dict(SourceSettings.model_fields))]


def _table(title: str, section: str, fields: Fields) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, expand=True)
    table.add_column(width=max(len(f"{section}.{name}") for name in fields), style="cyan", no_wrap=True)
    table.add_column(width=16, style="dim", overflow="fold")
    table.add_column(ratio=1)
    for name, field in fields.items():
        table.add_row(f"{section}.{name}", _default(field), Text(_meaning(field)))
    return table


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    return "" if value in (None, "") else str(value)


def _meaning(field: FieldInfo) -> str:
    text = (field.description or "").replace("\n", " ")
    choices = [str(choice) for choice in _choices(field.annotation)]
    return text if all(choice in text for choice in choices) else f"{text} One of {', '.join(choices)}."


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))

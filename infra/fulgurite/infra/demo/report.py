"""What the demo ends with: tables asked from ClickHouse, the curve, one rollout as a tree, what to try next."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from clickhouse_connect.driver import Client
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fulgurite.infra.demo import questions
from fulgurite.infra.demo.plots import CurvePoint, terminal_plot, write_png
from fulgurite.infra.demo.questions import Evaluation

MIN_RISE = 0.25
"""In held-out sampled reward: what the demo promises."""

_TABLE_ROWS = 16
"""Of reward by version: first and last always, the others evenly between."""


def report(console: Console, client: Client, run_id: str, data: Path, show_rollout: str | None) -> float | None:
    """Prints everything; gives the rise in held-out sampled reward, None where an evaluation is missing."""
    points = questions.curve(client, run_id)
    evaluations = questions.evaluations(client, run_id)
    console.print(_curve_table(points))
    if points:
        console.print(Text.from_ansi(terminal_plot(points, width=min(100, console.width))))
        png = data / f"reward-{run_id}.png"
        write_png(points, png)
        console.print(f"The same with standard errors: {png}", highlight=False, soft_wrap=True)
    console.print(_evaluation_table(evaluations))
    rise = _print_rise(console, client, run_id, evaluations)
    console.print(_accounts_table(client, run_id))
    if show_rollout:
        trace = f"{command_name()} trace {show_rollout} --data {data}"
        console.print(f"\n[bold]One rollout[/] ({trace})", highlight=False, soft_wrap=True)
    return rise


def command_name() -> str:
    """How to type the command here: make's environment is not on the PATH unless somebody activated it."""
    if shutil.which("fulgurite"):
        return "fulgurite"
    script = Path(sys.executable).with_name("fulgurite")
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def print_next(console: Console, data: Path, run_id: str) -> None:
    """Three questions in SQL, the topics, the stores."""
    flag = "" if data == Path(".fulgurite").absolute() else f" --data {data}"
    fulgurite = command_name()
    lines = [
        "\n[bold]What to try next[/]",
        f"  {fulgurite} up{flag}       # opens the stores again, with everything that happened",
        *(f'  {fulgurite} sql{flag} "{sql.format(run_id=run_id)}"' for sql in questions.TO_TRY),
        f"  {fulgurite} topics list{flag}   # what is on the log; {fulgurite} tail spans -n 3{flag} prints records",
        f"  {fulgurite} down{flag}     # when you are done",
        "Your own agent: examples/calculator/agent.py shows where to put it.",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _curve_table(points: Sequence[CurvePoint]) -> Table:
    table = Table(title="Reward by policy version (asked from ClickHouse)", title_justify="left")
    for name in ("version", "mode", "rollouts", "reward", "± s.e.", "tool use"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for point in _thin(points):
        table.add_row(
            str(point.version),
            point.mode,
            str(point.rollouts),
            f"{point.reward_mean:.3f}",
            f"{point.reward_sem:.3f}",
            f"{point.tool_use:.0%}",
        )
    return table


def _thin(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Held-out points all; training points evenly, with the first and the last."""
    train = [p for p in points if p.mode == "train"]
    step = max(1, math.ceil(len(train) / _TABLE_ROWS))
    kept = {p.version for p in train[::step]} | ({train[-1].version} if train else set[int]())
    return [p for p in points if p.mode != "train" or p.version in kept]


def _evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    table = Table(title="Held-out tasks", title_justify="left")
    for name in ("evaluation", "version", "sampling", "rollouts", "reward", "± s.e.", "tool use"):
        table.add_column(name, justify="left" if name in ("evaluation", "sampling") else "right")
    for item in evaluations:
        table.add_row(
            item.name,
            item.versions,
            item.sampling,
            str(item.rollouts),
            f"{item.reward_mean:.3f}",
            f"{item.reward_sem:.3f}",
            f"{item.tool_use:.0%}",
        )
    return table


def _print_rise(console: Console, client: Client, run_id: str, evaluations: Sequence[Evaluation]) -> float | None:
    """The same tasks before and after: the standard error is that of the differences."""
    found = questions.rise(client, run_id)
    if found is None:
        return None
    rise, error, tasks = found
    before, after = (
        next(item.reward_mean for item in evaluations if (item.name, item.sampling) == (name, "sampled"))
        for name in ("before", "after")
    )
    colour = "green" if rise >= MIN_RISE else "yellow"
    console.print(
        f"[{colour}]Held-out sampled reward: {before:.3f} → {after:.3f}, a rise of {rise:+.3f} ± {error:.3f} "
        f"(paired, {tasks} tasks it was never trained on).[/]",
        highlight=False,
        soft_wrap=True,
    )
    return rise


def _accounts_table(client: Client, run_id: str) -> Table:
    table = Table(title="Where every rollout of this run went", title_justify="left")
    for name in ("outcome", "reason", "rollouts"):
        table.add_column(name, justify="right" if name == "rollouts" else "left")
    for outcome, reason, rollouts in client.query(questions.ACCOUNTS, {"run_id": run_id}).result_rows:
        table.add_row(str(outcome), str(reason), str(rollouts))
    return table

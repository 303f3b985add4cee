"""What came out: a table of cells, comparisons seed by seed, the curve as text, JSON and a PNG. Knows no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.calculator.reproduce.cells import BASE, COMPARISONS, Cell, Sizes
from examples.calculator.reproduce.statistics import Estimate, estimate, paired

if TYPE_CHECKING:
    from examples.calculator.reproduce.training import Result

Results = Mapping[str, Mapping[int, "Result"]]
"""By cell and seed."""


def by_cell(results: Sequence[Result]) -> Results:
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    for result in results:
        found[result.cell][result.seed] = result
    return found


def last(results: Mapping[int, Result]) -> dict[int, float]:
    """Held-out reward after the last step, by seed."""
    return {seed: result.heldout[-1][1] for seed, result in results.items()}


def average(results: Mapping[int, Result]) -> dict[int, float]:
    """Held-out reward, mean over all evaluations but the first, by seed: high where learning is fast and stays."""
    return {seed: sum(r for _, r in result.heldout[1:]) / len(result.heldout[1:]) for seed, result in results.items()}


def report(console: Console, results: Results, cells: Sequence[Cell], sizes: Sizes) -> None:
    """Prints everything."""
    console.print(_cells(results, cells))
    console.print(_comparisons(results))
    console.print(Text.from_ansi(_plot(results)))
    console.print(
        f"Held-out reward: {sizes.heldout_tasks} tasks never trained on, sampled at temperature 1. Intervals: 95 %, "
        "Student's t over seeds; differences are taken seed by seed (same start model, same tasks)."
    )


JUDGED_SEEDS = 3
"""With fewer, an interval spans nearly everything."""


def contradictions(results: Results) -> list[str]:
    """What should not be, a sentence each: no learning, or an effect the other way round; only where there are
    JUDGED_SEEDS. What cannot be told apart from nothing is in the table, and none."""
    found: list[str] = []
    base = results.get(BASE.name, {})
    if len(base) >= JUDGED_SEEDS:
        before = {seed: result.heldout[0][1] for seed, result in base.items()}
        gain = paired(last(base), before)
        if not (gain.excludes_zero and gain.mean > 0):
            found.append(f"{BASE.name} did not learn: {gain} over {gain.n} seeds")
    for each in COMPARISONS:
        better, worse = results.get(each.better, {}), results.get(each.worse, {})
        measures = [paired(measure(better), measure(worse)) for measure in (last, average)]
        if measures[0].n >= JUDGED_SEEDS and any(m.excludes_zero and m.mean < 0 for m in measures):
            found.append(
                f"{each.better} is worse than {each.worse}: {measures[0]}, mean over evaluations {measures[1]}"
            )
    return found


def summary(results: Results, sizes: Sizes) -> dict[str, Any]:
    """For build/bench/reproduce.json."""
    return {
        "sizes": asdict(sizes),
        "in_process": True,
        "cells": {
            name: {
                "seeds": sorted(found),
                "before": asdict(estimate([result.heldout[0][1] for result in found.values()])),
                "after": asdict(estimate(list(last(found).values()))),
                "average": asdict(estimate(list(average(found).values()))),
                "curve": [
                    {"step": step, **asdict(estimate([dict(result.heldout)[step] for result in found.values()]))}
                    for step, _ in next(iter(found.values())).heldout
                ],
                "seconds": sum(result.seconds for result in found.values()),
            }
            for name, found in results.items()
        },
        "comparisons": [
            {
                "better": each.better,
                "worse": each.worse,
                "expected": each.expected,
                "after": asdict(paired(last(results[each.better]), last(results[each.worse]))),
                "average": asdict(paired(average(results[each.better]), average(results[each.worse]))),
            }
            for each in COMPARISONS
            if each.better in results and each.worse in results
        ],
    }


def write(path: Path, results: Results, sizes: Sizes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary(results, sizes), indent=1).replace("NaN", "null")
    path.write_text(text + "\n")


def write_png(path: Path, results: Results) -> None:
    """Held-out reward by step, mean and interval over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for name, found in results.items():
        steps, estimates = _curve(found)
        means = [each.mean for each in estimates]
        (line,) = axes.plot(steps, means, marker="o", markersize=3, label=f"{name} ({len(found)} seeds)")
        if all(each.n > 1 for each in estimates):
            low = [each.mean - each.half_width for each in estimates]
            high = [each.mean + each.half_width for each in estimates]
            axes.fill_between(steps, low, high, alpha=0.12, color=line.get_color())
    axes.set(xlabel="step", ylabel="held-out reward", ylim=(0, 1), title="Calculator: held-out reward by step")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cells(results: Results, cells: Sequence[Cell]) -> Table:
    table = Table(title="Held-out reward, mean over seeds with 95 % intervals", title_justify="left")
    for name in (
        "cell",
        "group",
        "lag",
        "correction",
        "credit",
        "seeds",
        "before",
        "after",
        "mean over evaluations",
        "tokens/s",
    ):
        table.add_column(name, justify="left" if name in ("cell", "correction", "credit") else "right")
    for cell in cells:
        found = results.get(cell.name)
        if not found:
            continue
        before = estimate([result.heldout[0][1] for result in found.values()])
        tokens = sum(point.tokens for result in found.values() for point in result.points)
        table.add_row(
            cell.name, str(cell.group_size), str(cell.lag), cell.correction if cell.lag else "",
            cell.credit, str(len(found)),
            _level(before), _level(estimate(list(last(found).values()))),
            _level(estimate(list(average(found).values()))),
            f"{tokens / sum(result.seconds for result in found.values()):,.0f}",
        )  # fmt: skip
    return table


def _comparisons(results: Results) -> Table:
    table = Table(title="Ablations: difference in held-out reward, seed by seed", title_justify="left")
    for name in ("this", "against", "after", "mean over evaluations", "expected", "seen"):
        table.add_column(name)
    for each in COMPARISONS:
        if each.better not in results or each.worse not in results:
            continue
        after = paired(last(results[each.better]), last(results[each.worse]))
        over_all = paired(average(results[each.better]), average(results[each.worse]))
        table.add_row(each.better, each.worse, str(after), str(over_all), each.expected, _verdict(after, over_all))
    return table


def _verdict(*found: Estimate) -> str:
    """Of the two measures the clearer one."""
    if any(each.excludes_zero and each.mean < 0 for each in found):
        return "[red]the opposite[/]"
    return "[green]yes[/]" if any(each.excludes_zero for each in found) else "[yellow]not told apart[/]"


def _level(found: Estimate) -> str:
    return f"{found.mean:.3f} ± {found.half_width:.3f}" if found.n > 1 else f"{found.mean:.3f}"


def _curve(found: Mapping[int, Result]) -> tuple[list[int], list[Estimate]]:
    steps = [step for step, _ in next(iter(found.values())).heldout]
    return steps, [estimate([dict(result.heldout)[step] for result in found.values()]) for step in steps]


def _plot(results: Results, width: int = 90, height: int = 18) -> str:
    import plotext

    plotext.clear_figure()
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.ylim(0, 1)
    for name, found in results.items():
        steps, estimates = _curve(found)
        plotext.plot(steps, [each.mean for each in estimates], label=name, marker="braille")
    plotext.title("held-out reward by step, mean over seeds")
    return str(plotext.build())

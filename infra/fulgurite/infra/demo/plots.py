"""The reward curve, as characters for a terminal and as a PNG. Knows numbers, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One policy version: mean reward of the rollouts it sampled, its standard error, how many they are."""

    version: int
    mode: str
    reward_mean: float
    reward_sem: float
    rollouts: int
    tool_use: float


def terminal_plot(points: Sequence[CurvePoint], width: int = 90, height: int = 16) -> str:
    """Reward by version as text."""
    import plotext

    plotext.clear_figure()
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.ylim(0, 1)
    for mode, marker in (("train", "braille"), ("val", "x")):
        chosen = [p for p in points if p.mode == mode]
        if chosen:
            label = "training rollouts" if mode == "train" else "held-out, sampled"
            draw = plotext.plot if mode == "train" else plotext.scatter
            draw([p.version for p in chosen], [p.reward_mean for p in chosen], label=label, marker=marker)
    plotext.title("reward by policy version")
    plotext.xlabel("policy version")
    return str(plotext.build())


def write_png(points: Sequence[CurvePoint], path: Path) -> None:
    """The same with standard errors and the tool-use rate, replaced in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = sorted((p for p in points if p.mode == "train"), key=lambda p: p.version)
    val = sorted((p for p in points if p.mode == "val"), key=lambda p: p.version)
    if train:
        versions, means = [p.version for p in train], [p.reward_mean for p in train]
        low = [p.reward_mean - p.reward_sem for p in train]
        high = [p.reward_mean + p.reward_sem for p in train]
        axes.plot(versions, means, color="tab:blue", label="reward, training rollouts (± standard error)")
        axes.fill_between(versions, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        axes.plot(versions, [p.tool_use for p in train], color="tab:gray", linestyle=":", label="tool use")
    if val:
        axes.errorbar(
            [p.version for p in val],
            [p.reward_mean for p in val],
            yerr=[p.reward_sem for p in val],
            fmt="o",
            color="tab:orange",
            capsize=4,
            label="reward, held-out tasks, sampled",
        )
    axes.set_xlabel("policy version that sampled the rollout")
    axes.set_ylabel("mean reward")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp.png")
    figure.savefig(fresh, dpi=120)
    fresh.replace(path)

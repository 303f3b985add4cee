"""What the demo shows while it works: a live panel on a terminal, a line every few seconds in a log.

Knows the figures (Figures), not where they come from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASES = (
    "stores",
    "services",
    "warm start",
    "first version",
    "evaluation before",
    "training",
    "evaluation after",
    "report",
)
LOG_SECONDS = 5.0
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_POINTS = 60


@dataclass(slots=True)
class Figures:
    """What is known now. None or empty where nothing is known yet; a dash is shown for it."""

    done: int = 0
    total: int = 0
    what: str = ""
    version: int | None = None
    served_version: int | None = None
    step: int = 0
    steps: int = 0
    reward: float | None = None
    """Mean reward of the last window."""
    curve: list[float] = field(default_factory=list)
    tool_use: float | None = None
    rollouts_per_second: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None
    lag: dict[str, int] = field(default_factory=dict)
    dead_letters: int | None = None
    rss_bytes: int = 0
    restarts: dict[str, int] = field(default_factory=dict)


class Screen:
    """Use as a context manager; call phase() and show() as things happen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._phase = ""
        self._started = self._phase_started = time.monotonic()
        self._last_line = 0.0
        self._done_before: int | None = None
        """What an earlier life of the demo had done of this phase."""
        self._live: Live | None = None
        self._took: dict[str, float] = {}

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def phase(self, name: str, note: str = "") -> None:
        """A new phase begins; says how long the last one took."""
        now = time.monotonic()
        if self._phase:
            self._took[self._phase] = now - self._phase_started
            self.console.print(f"[green]✓[/] {self._phase} [dim]({self._took[self._phase]:.0f} s)[/]")
        self._phase, self._phase_started, self._last_line, self._done_before = name, now, 0.0, None
        if note:
            self.say(note)

    def end(self) -> None:
        self.phase("")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, figures: Figures) -> None:
        """Draws the figures: at once on a terminal, at most every LOG_SECONDS in a log."""
        if self._live:
            self._live.update(self._panel(figures), refresh=True)
        elif time.monotonic() - self._last_line >= LOG_SECONDS:
            self._last_line = time.monotonic()
            left = self.left_seconds(figures)
            rest = "" if left is None else f" · about {left:.0f} s left"
            line = f"[{self.elapsed_seconds:4.0f} s] {self._phase}: {_line(figures)}{rest}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def left_seconds(self, figures: Figures) -> float | None:
        """Time left in this phase, from how far it has come; None before it has come anywhere."""
        if self._done_before is None or figures.done < self._done_before:
            self._done_before = figures.done
        done = figures.done - self._done_before
        if done <= 0 or figures.total <= 0:
            return None
        return (time.monotonic() - self._phase_started) * (figures.total - figures.done) / done

    def _panel(self, figures: Figures) -> RenderableType:
        left = self.left_seconds(figures)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"{figures.what or self._phase}", style="bold"),
            ProgressBar(total=max(1, figures.total), completed=figures.done, width=30),
            Text(f"{figures.done}/{figures.total}" if figures.total else ""),
            Text(f"about {left:.0f} s left" if left is not None else "", style="dim"),
        )
        rows = Table.grid(padding=(0, 3))
        cells = [(name, value) for name, value in _cells(figures) if value]
        for at in range(0, len(cells), 3):
            rows.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in cells[at : at + 3]))
        parts: list[RenderableType] = [head, rows]
        if figures.curve:
            parts.append(Text.assemble(("reward ", "dim"), (sparkline(figures.curve), "green")))
        title = f"fulgurite demo · {self._step_number()} · {self.elapsed_seconds:.0f} s"
        return Panel(Group(*parts), title=title, title_align="left")

    def _step_number(self) -> str:
        at = PHASES.index(self._phase) + 1 if self._phase in PHASES else 0
        return f"{at} of {len(PHASES)}: {self._phase}" if at else self._phase


def sparkline(values: list[float]) -> str:
    """Rewards between 0 and 1 as bars; the newest _CURVE_POINTS."""
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, max(0, round(value * top)))] for value in values[-_CURVE_POINTS:])


def _cells(figures: Figures) -> list[tuple[str, str]]:
    staleness = (
        f"{figures.staleness_mean:.2f} mean, {figures.staleness_max} max (versions)"
        if figures.staleness_mean is not None and figures.staleness_max is not None
        else ""
    )
    served = "" if figures.served_version is None else f" (served {figures.served_version})"
    return [
        ("policy version", "" if figures.version is None else f"{figures.version}{served}"),
        ("reward, last window", "" if figures.reward is None else f"{figures.reward:.3f}"),
        ("tool use", "" if figures.tool_use is None else f"{figures.tool_use:.0%}"),
        ("rollouts/s", "" if figures.rollouts_per_second is None else f"{figures.rollouts_per_second:.1f}"),
        ("staleness", staleness),
        ("lag", ", ".join(f"{name} {lag}" for name, lag in figures.lag.items())),
        ("dead letters", "" if figures.dead_letters is None else str(figures.dead_letters)),
        ("memory", f"{figures.rss_bytes / 2**30:.1f} GiB" if figures.rss_bytes else ""),
        ("restarts", ", ".join(f"{name} {count}" for name, count in figures.restarts.items())),
    ]


def _line(figures: Figures) -> str:
    head = f"{figures.what} {figures.done}/{figures.total}" if figures.total else figures.what
    rest = [f"{name} {value}" for name, value in _cells(figures) if value]
    return " · ".join(filter(None, [head, *rest]))

"""Is the learning real? Trains the calculator on several seeds and with one thing changed at a time.

    make reproduce                              # 5 seeds, all cells: an hour or two on two cores
    make reproduce ARGS=--quick                 # 2 seeds, the base and one ablation: some minutes
    python -m examples.calculator.reproduce --cells base,lag16,lag16-uncorrected --seeds 3

    warm start (once a seed) ─► cell by cell, seed by seed ─► tables, curve, build/bench/reproduce.json and .png

Finished cells are kept in build/reproduce and not run again: stopped and started again, it goes on where it was. Runs
in one process (`training.py` says what of the real system that is, and what it is not); `make demo` is the whole one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from examples.calculator.reproduce import report
from examples.calculator.reproduce.cells import CELLS, QUICK, Cell, Sizes

ROOT = Path(__file__).resolve().parents[3]
QUICK_CELLS = ("base", "lag16-uncorrected")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for wrong arguments; 130 after Ctrl-C, with everything finished so far kept."""
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    if options.seeds is not None:
        sizes = Sizes(**{**vars(sizes), "seeds": options.seeds})
    names = options.cells.split(",") if options.cells else QUICK_CELLS if options.quick else [c.name for c in CELLS]
    unknown = sorted(set(names) - {cell.name for cell in CELLS})
    if unknown or sizes.seeds < 1:
        known = ", ".join(cell.name for cell in CELLS)
        print(f"error: --cells {', '.join(unknown)}: unknown; they are {known}; --seeds is at least 1", file=sys.stderr)
        return 2
    cells = [cell for cell in CELLS if cell.name in names]
    try:
        return reproduce(Console(width=None if sys.stdout.isatty() else 160), options.folder, options.out, cells, sizes)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on behind the last finished cell", file=sys.stderr)
        return 130


def reproduce(console: Console, folder: Path, out: Path, cells: list[Cell], sizes: Sizes) -> int:
    """Runs what is not finished and reports what is."""
    from examples.calculator.reproduce.training import Result, finished, run_cell

    folder.mkdir(parents=True, exist_ok=True)
    # Seeds outside, so that a run that is stopped has every cell of the seeds it got to.
    todo = [(cell, seed) for seed in range(1, sizes.seeds + 1) for cell in cells]
    results: list[Result] = []
    for number, (cell, seed) in enumerate(todo, 1):
        result = finished(folder, cell, seed, sizes)
        if result is None:
            clock = _Clock(console, f"{number}/{len(todo)} {cell.name} seed {seed}")
            result = run_cell(folder, cell, seed, sizes, clock.tell)
            left = sum(finished(folder, c, s, sizes) is None for c, s in todo[number:])
            clock.done(f"held-out {result.heldout[0][1]:.3f} -> {result.heldout[-1][1]:.3f}", left)
        results.append(result)
        report.write(out / "reproduce.json", report.by_cell(results), sizes)
    found = report.by_cell(results)
    report.report(console, found, cells, sizes)
    report.write_png(out / "reproduce.png", found)
    console.print(f"Figures: {out / 'reproduce.json'}; curves: {out / 'reproduce.png'}", soft_wrap=True)
    return 0


class _Clock:
    """A line now and then, and how long the rest will take."""

    _EVERY_SECONDS = 15.0

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._began = self._told = time.monotonic()

    def tell(self, what: str) -> None:
        now = time.monotonic()
        if now - self._told >= self._EVERY_SECONDS:
            self._told = now
            self._console.print(f"  {self._name}: {what}", highlight=False)

    def done(self, what: str, left: int) -> None:
        seconds = time.monotonic() - self._began
        rest = f"about {left * seconds / 60:.0f} min left" if left else "the last one"
        self._console.print(f"{self._name}: {what}, {seconds:.0f} s; {rest}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.calculator.reproduce",
        description="Trains the calculator on several seeds, with ablations; finished cells are kept.",
        epilog="Example: python -m examples.calculator.reproduce --quick",
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, few steps, the base and one ablation")
    parser.add_argument("--seeds", type=int, help="how many; 5, with --quick 2")
    parser.add_argument("--cells", default="", help=f"of {', '.join(cell.name for cell in CELLS)}; all of them")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "reproduce", help="where finished cells are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="where the figures are written")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

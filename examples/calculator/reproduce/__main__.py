"""Is the learning real? Trains the calculator on several seeds and with one thing changed at a time.

    make reproduce ARGS="--jobs 2"              # 5 seeds, all cells, two at a time: half an hour on two quiet cores
    make reproduce ARGS=--quick                 # 2 seeds, the base and one ablation: two minutes
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

from examples.calculator.reproduce import jobs as running
from examples.calculator.reproduce import report
from examples.calculator.reproduce.cells import CELLS, QUICK, Cell, Sizes

ROOT = Path(__file__).resolve().parents[3]
QUICK_CELLS = ("base", "lag16-uncorrected")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where base did not learn or an effect is the other way round, by at least 3 seeds; 2 for wrong
    arguments; 130 after Ctrl-C, with everything finished so far kept."""
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    if options.seeds is not None:
        sizes = Sizes(**{**vars(sizes), "seeds": options.seeds})
    names = options.cells.split(",") if options.cells else QUICK_CELLS if options.quick else [c.name for c in CELLS]
    unknown = sorted(set(names) - {cell.name for cell in CELLS})
    if unknown or sizes.seeds < 1 or options.jobs < 1:
        known = ", ".join(cell.name for cell in CELLS)
        print(
            f"error: --cells {', '.join(unknown)}: unknown; they are {known}; --seeds and --jobs are at least 1",
            file=sys.stderr,
        )
        return 2
    cells = [cell for cell in CELLS if cell.name in names]
    try:
        console = Console(width=None if sys.stdout.isatty() else 160)
        return reproduce(console, options.folder, options.out, cells, sizes, options.jobs)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on behind the last finished cell", file=sys.stderr)
        return 130


def reproduce(console: Console, folder: Path, out: Path, cells: list[Cell], sizes: Sizes, jobs: int = 1) -> int:
    """Runs what is not finished and reports what is."""
    from examples.calculator.reproduce.training import Result, finished

    folder.mkdir(parents=True, exist_ok=True)
    # Seeds outside, so that a run that is stopped has every cell of the seeds it got to.
    todo = [(cell, seed) for seed in range(1, sizes.seeds + 1) for cell in cells]
    left = [(cell, seed) for cell, seed in todo if finished(folder, cell, seed, sizes) is None]
    console.print(f"{len(todo)} cells, {len(todo) - len(left)} of them finished before, {jobs} at a time")
    began = time.monotonic()

    def report_finished(done: int) -> None:
        results: list[Result] = [r for cell, seed in todo if (r := finished(folder, cell, seed, sizes))]
        report.write(out / "reproduce.json", report.by_cell(results), sizes)
        if 0 < done < len(left):
            minutes = (time.monotonic() - began) / done * (len(left) - done) / 60
            console.print(f"{done} of {len(left)} done, about {minutes:.0f} min left", highlight=False)

    running.run(folder, left, sizes, jobs, report_finished)
    report_finished(0)
    found = report.by_cell([r for cell, seed in todo if (r := finished(folder, cell, seed, sizes))])
    report.report(console, found, cells, sizes)
    report.write_png(out / "reproduce.png", found)
    wrong = report.contradictions(found)
    for each in wrong:
        console.print(f"[red]not as it should be:[/] {each}", highlight=False, soft_wrap=True)
    console.print(f"Figures: {out / 'reproduce.json'}; curves: {out / 'reproduce.png'}", soft_wrap=True)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.calculator.reproduce",
        description="Trains the calculator on several seeds, with ablations; finished cells are kept.",
        epilog="Example: python -m examples.calculator.reproduce --quick",
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, few steps, the base and one ablation")
    parser.add_argument("--seeds", type=int, help="how many; 5, with --quick 2")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a core each; 1")
    parser.add_argument("--cells", default="", help=f"of {', '.join(cell.name for cell in CELLS)}; all of them")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "reproduce", help="where finished cells are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="where the figures are written")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""Runs cells: here, or some at a time in processes of their own.

Not part of the command's own module: a new process knows nothing of what the module it was started as has defined.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from examples.calculator.reproduce.cells import Cell, Sizes


def run(folder: Path, left: list[tuple[Cell, int]], sizes: Sizes, jobs: int, done: Callable[[int], None]) -> None:
    """One after another here, or in processes of their own, one thread each; `done` hears how many are."""
    if jobs == 1:
        for number, (cell, seed) in enumerate(left, 1):
            run_one(folder, cell, seed, sizes)
            done(number)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        # Two cells of a seed must not make its start model at the same time.
        for made in [pool.submit(start_one, folder, seed, sizes) for seed in sorted({seed for _, seed in left})]:
            made.result()
        running = [pool.submit(run_one, folder, cell, seed, sizes) for cell, seed in left]
        for number, finished in enumerate(as_completed(running), 1):
            finished.result()
            done(number)


def start_one(folder: Path, seed: int, sizes: Sizes) -> None:
    from examples.calculator.reproduce.training import start_model

    start_model(folder, seed, sizes, _Clock(f"seed {seed}").tell)


def run_one(folder: Path, cell: Cell, seed: int, sizes: Sizes) -> None:
    from examples.calculator.reproduce.training import run_cell

    clock = _Clock(f"{cell.name} seed {seed}")
    result = run_cell(folder, cell, seed, sizes, clock.tell)
    clock.done(f"held-out {result.heldout[0][1]:.3f} -> {result.heldout[-1][1]:.3f}")


class _Clock:
    """A line now and then."""

    _EVERY_SECONDS = 15.0

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = self._told = time.monotonic()

    def tell(self, what: str) -> None:
        now = time.monotonic()
        if now - self._told >= self._EVERY_SECONDS:
            self._told = now
            print(f"  {self._name}: {what}", flush=True)

    def done(self, what: str) -> None:
        print(f"{self._name}: {what}, {time.monotonic() - self._began:.0f} s", flush=True)

"""A program: the trainer in one process after another, each killed at a given point of the contract, the last one not.

    python -m tests.streams.trainer_lives POINT@STEP …      settings from the environment; exit code of the last life

Lives are forks of one process, so that torch is imported once; each ends by SIGKILL to itself, which nothing can catch.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fulgurite.schemas.settings import load_settings
from fulgurite.streams.learners import learner
from fulgurite.streams.trainer import checkpoints, service
from fulgurite.streams.transactions import Transactions

assert learner  # imported before the forks


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, step: int) -> None:
    """Dies at `point`, once `step` versions after the first are made."""
    trainer: Any = service.Trainer
    here = {"step": -1}  # of the run this life serves; -1 before it is known
    original = trainer.__init__

    @functools.wraps(original)
    def remember(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        here["run"] = arguments[1]

    def due() -> bool:
        run: Any = here.get("run")
        return run is not None and run.step == step

    def after(name: str) -> None:
        method = getattr(trainer, name)

        async def wrapped(self: Any, *arguments: Any) -> Any:
            result = await method(self, *arguments)
            if due():
                kill()
            return result

        setattr(trainer, name, wrapped)

    trainer.__init__ = remember
    if point in ("fill", "optimize", "write_checkpoint", "remove_old"):
        after(point)
    elif point == "half_written":
        write: Any = checkpoints.folder_sha256
        checkpoints.folder_sha256 = lambda folder: kill() if due() and ".tmp-" in str(folder) else write(folder)  # pyright: ignore[reportAttributeAccessIssue]
    else:

        def hook(reached: str) -> None:
            if reached == point and due():
                kill()

        service.Transactions = functools.partial(Transactions, hook=hook)  # pyright: ignore[reportAttributeAccessIssue]


def live(life: str) -> int:
    """One life in a process of its own; gives its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        point, _, step = life.partition("@")
        if point:
            arm(point, int(step))
        os._exit(service.main(load_settings()))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(lives: list[str]) -> int:
    for life in lives:
        code = live(life)
        sys.stderr.write(f"life {life} ended with {code}\n")
        if code != -signal.SIGKILL:
            return 100
        assert Path.cwd().is_dir()
    return live("") or live("")  # the second finds the run finished


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

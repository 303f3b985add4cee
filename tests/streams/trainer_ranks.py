"""A program: one rank of a trainer under torchrun, which dies once at each of the points it is told.

    torchrun … -m tests.streams.trainer_ranks FOLDER RANK:POINT@STEP …     settings from the environment

A file in FOLDER says that a point had its victim: torchrun starts all ranks again after each.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fulgurite.schemas.settings import load_settings
from fulgurite.streams.learners.launch import launched_rank
from fulgurite.streams.learners.learner import Learner
from fulgurite.streams.trainer import service


def arm(folder: Path, death: str) -> None:
    """Rank 0 dies after a step of the trainer's contract, another rank within the learner's optimizer step."""
    rank, _, rest = death.partition(":")
    point, _, step = rest.partition("@")
    mark = folder / death.replace(":", "-")
    if int(rank) != launched_rank() or mark.exists():
        return
    owner: Any = service.Trainer if rank == "0" else Learner
    method = getattr(owner, point)
    calls = {"count": 0}

    def die() -> None:
        calls["count"] += 1
        if calls["count"] == int(step):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == "0":

        @functools.wraps(method)
        async def after(*arguments: Any) -> Any:
            result = await method(*arguments)
            die()
            return result

        setattr(owner, point, after)
    else:

        @functools.wraps(method)
        def before(*arguments: Any) -> Any:
            die()
            return method(*arguments)

        setattr(owner, point, before)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        arm(Path(sys.argv[1]), each)
    sys.exit(service.main(load_settings()))

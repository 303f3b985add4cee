"""Runs the assembler as a process of its own that kills itself at a step: `python assembler_driver.py STEP COUNT`.

Settings come from the environment, as for the real command. STEP `never` runs until SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys

from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import load_settings
from fulgurite.streams.assembler.service import serve


def main(step: str, count: int) -> int:
    left = count

    def hook(reached: str) -> None:
        nonlocal left
        if reached == step:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    settings = load_settings()
    return run_service("assembler", settings.log, lambda stop: serve(settings, stop, hook))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

"""Ends what a run of tests started, where the run itself was killed: processes of tests would go on for ever.

Each process of a run has one of these as its child: it waits for the end of its stdin, which is a pipe that its parent
holds, kills whatever has the parent's mark in its environment, which all that a test starts inherits, and removes the
parent's folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

MARK = "TESTS_OF_FULGURITE"


def watch(folder: str) -> None:
    """From now on, until `stop`."""
    os.environ[MARK] = secrets.token_hex(16)
    # Its own session: the signal that ends a run's process group is not for it.
    command = [sys.executable, "-S", __file__, folder]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    _WATCHERS.append(watcher)  # a Popen that is collected closes the pipe


_WATCHERS: list[subprocess.Popen[bytes]] = []


def stop() -> None:
    """The run comes to its end, and its tests have ended what they started."""
    for watcher in _WATCHERS:
        watcher.kill()
        watcher.communicate()
    _WATCHERS.clear()


def _marked(mark: str) -> list[int]:
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def _main() -> None:
    sys.stdin.buffer.read()
    for pid in _marked(os.environ[MARK]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    _main()

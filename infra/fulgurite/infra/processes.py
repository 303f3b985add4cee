"""Child processes that can never outlive their parent, with a bounded log each.

Promises: however the parent ends, `kill -9` included, the child is gone (see launch.py); the child leads a process
group of its own, so that Ctrl-C in a terminal reaches the parent alone, and stop() all that the child
started; its output goes to a log file that is rotated when a child starts. Does not know what the children do, nor
restarts them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from fulgurite.schemas.errors import StartError

MAX_LOG_BYTES = 16 * 1024 * 1024
"""A log above this is rotated when its process starts; one older generation is kept."""

_TAIL_BYTES = 16 * 1024
_LAUNCH = Path(__file__).with_name("launch.py")


class ChildProcess:
    """A running child. Made by start_process."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._popen = popen
        self._reaping = threading.Lock()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """How it ended (minus the signal's number if by a signal); None while it runs."""
        with self._reaping:
            if self._popen.returncode is None and self._has_ended():
                self._reap()
            return self._popen.returncode

    @property
    def running(self) -> bool:
        return self.returncode is None

    def log_tail(self, lines: int = 20) -> str:
        return tail(self.log, lines)

    def wait(self, timeout_seconds: float) -> int | None:
        """Its return code, None if it still runs then."""
        wait_until(lambda: not self.running, timeout_seconds)
        return self.returncode

    def stop(self, timeout_seconds: float = 10.0) -> int:
        """SIGTERM to the child, a bounded wait, SIGKILL to its whole group. Safe to call again."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._popen.terminate()
            self.wait(timeout_seconds)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL to the group, now: what a crash looks like. Gives the return code."""
        with self._reaping:
            if self._popen.returncode is None:
                self._reap()
            return self._popen.wait()

    def _has_ended(self) -> bool:
        """Without reaping it: until then the number of its group cannot go to a stranger."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _reap(self) -> None:
        """Kills what is left of the group, then reaps the child."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: only zombies (macOS)
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        if self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()


def start_process(
    name: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    keep_open: Sequence[int] = (),
) -> ChildProcess:
    """Starts `command`, its output appended to `log`. `env` is its whole environment (default: ours).

    Its stdin is a pipe that we hold: a child without pdeathsig can watch it for the end. `keep_open` are descriptors it
    inherits. Raises StartError when the program or the log file cannot be opened.
    """
    if not Path(command[0]).exists() and _which(str(command[0])) is None:
        raise StartError(f"{name}: there is no program {command[0]}")
    arguments = [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), *(str(part) for part in command)]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        _rotate(log)
        with log.open("ab") as output:
            popen = _spawn(
                lambda: subprocess.Popen(
                    arguments,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(env) if env is not None else None,
                    cwd=cwd,
                    pass_fds=tuple(keep_open),
                    process_group=0,
                )
            )
    except OSError as error:
        raise StartError(f"{name} cannot be started: {error}") from error
    return ChildProcess(name, popen, log)


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log, as text; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def wait_until(ready: Callable[[], bool], timeout_seconds: float, every_seconds: float = 0.05) -> bool:
    """Polls until `ready` says so; False when the time is up first."""
    deadline = time.monotonic() + timeout_seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_seconds)
    return True


def _rotate(log: Path) -> None:
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(log.with_name(log.name + ".1"))


def _which(program: str) -> str | None:
    import shutil

    return shutil.which(program)


# The kernel sends the parent-death signal when the *thread* that forked ends, not the process. So one thread, which
# lives as long as the process, starts all children, whichever thread asks for it.
_Job = tuple[Callable[[], "subprocess.Popen[bytes]"], "Future[subprocess.Popen[bytes]]"]
_jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_spawner_lock = threading.Lock()
_spawner: tuple[int, threading.Thread] | None = None


def _spawn(job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    global _spawner
    with _spawner_lock:
        if _spawner is None or _spawner[0] != os.getpid():  # a fork has no threads of its parent
            thread = threading.Thread(target=_spawn_for_ever, name="spawner", daemon=True)
            thread.start()
            _spawner = (os.getpid(), thread)
    result: Future[subprocess.Popen[bytes]] = Future()
    _jobs.put((job, result))
    return result.result(timeout=30)


def _spawn_for_ever() -> None:
    while True:
        job, result = _jobs.get()
        try:
            result.set_result(job())
        except BaseException as error:
            result.set_exception(error)

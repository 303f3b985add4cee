"""Runs a command so that nothing it starts outlives it, or us. Run as a script, by path: python -I -S guard.py COMMAND…

For programs that start processes of their own and do not end them when they are killed, as vLLM's server does: its
engine stays, with all its memory. Linux only.

Promises: when the command ends, however it does, all its descendants are killed; when whoever started the guard ends,
`kill -9` included, so are the command and its descendants. SIGTERM and SIGINT are handed on to the command. The exit
status is the command's (128 and the signal's number where one ended it), but a command that ends by itself with 0 gives
1: a server is not done, it stopped (vLLM's says 0 when its engine has died).

Stdin must be a pipe that is held open by whoever starts the guard (processes.py does): its end says that they ended.
Killing the guard's process group, as processes.py does, ends everything at once.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TRACKER = b"multiprocessing.resource_tracker"
_TRACKER_SECONDS = 3.0


def main(arguments: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    # Orphans below become our children, so that they can be found. And we live long enough to see to them.
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) or libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0):
        print(f"guard: prctl failed: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 1
    asked: list[int] = []
    command: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if command:
            command.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    for number in list(asked):  # came before there was a command
        command.send_signal(number)
    parent_ended = _wait(os.pidfd_open(command.pid))
    if parent_ended:
        command.kill()
    status = command.wait()
    _kill_children()
    if status < 0:
        return 128 - status
    return status if status or asked else 1


def _wait(command: int) -> bool:
    """Returns when the command or our parent has ended; whether it was the parent."""
    stdin = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([command, stdin], [], [])
        if command in ready:
            return False
        if not os.read(stdin, 4096):
            return True


def _kill_children() -> None:
    """Until there are none: those of a killed child become ours in turn.

    Python's trackers of shared memory are spared a moment: they remove what the others left, then end by themselves.
    """
    deadline = time.monotonic() + _TRACKER_SECONDS
    while True:
        for child, command in _children():
            if _TRACKER not in command or time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            time.sleep(0.02)


def _children() -> list[tuple[int, bytes]]:
    """Their pids and command lines."""
    found: list[tuple[int, bytes]] = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = file.read()
            except OSError:
                continue  # it has ended meanwhile
            if parent == os.getpid():
                found.append((int(entry), command))
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Execs a command such that it dies with its parent. Run as a script, by path: python -I -S launch.py PARENT COMMAND…

A small program of its own instead of preexec_fn, which may deadlock in a process with threads. On Linux the kernel
sends SIGKILL when the thread that started this process ends (PR_SET_PDEATHSIG survives exec); the check after it closes
the gap in which the parent may have died before. Elsewhere it only execs: there a child must watch its stdin.
"""

import os
import sys

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def main(arguments: list[str]) -> None:
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the parent process is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])

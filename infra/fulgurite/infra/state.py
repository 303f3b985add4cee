"""What runs on a data folder: written by `fulgurite up` to <data>/run/state.json, read by down and status.

A process is known by its number *and* its start, so that a number the system gave to a stranger after a crash or a
reboot is never taken for ours. Holds no secrets.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from fulgurite.schemas.errors import StartError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessRef(BaseModel):
    """A process that cannot be confused with another."""

    pid: int
    started: str
    """On Linux the boot and the clock tick of its start; elsewhere its start time."""

    @classmethod
    def current(cls) -> ProcessRef:
        pid = os.getpid()
        return cls(pid=pid, started=_start_of(pid) or "")

    def alive(self) -> bool:
        return bool(self.started) and _start_of(self.pid) == self.started


class ChildState(BaseModel):
    """One supervised process."""

    name: str
    pid: int | None
    restarts: int = 0
    log: Path
    error: str = ""
    """Why the last start failed, if it did."""


class RunState(BaseModel):
    """The whole file."""

    owner: ProcessRef
    ready: bool = False
    kafka: str = ""
    clickhouse: str = ""
    children: list[ChildState] = []


def write_state(data: Path, state: RunState) -> None:
    """Complete or not at all, whichever threads write. Raises StartError: the disk is full, the folder is not ours."""
    path = _state_path(data)
    temporary = path.with_name(f"state.{threading.get_native_id()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(state.model_dump_json(indent=1))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}") from error


def read_state(data: Path) -> RunState | None:
    """The state of a living owner; None where nothing runs, whatever an old file says."""
    try:
        state = RunState.model_validate_json(_state_path(data).read_bytes())
    except (OSError, ValidationError):
        return None
    return state if state.owner.alive() else None


def remove_state(data: Path) -> None:
    path = _state_path(data)
    for left_over in path.parent.glob("state.*.tmp"):  # of a writer that was killed
        left_over.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _state_path(data: Path) -> Path:
    return data / "run" / "state.json"


def _start_of(pid: int) -> str | None:
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        if _BOOT_ID.exists():
            # The name in parentheses may itself hold spaces and parentheses; the start is field 22.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return f"{_BOOT_ID.read_text().strip()}:{fields[19]}"
        return f"{psutil.Process(pid).create_time():.2f}"
    except (psutil.Error, OSError):
        return None

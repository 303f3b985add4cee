"""A version's folder that another process of the same run wrote first, and how who owns the run takes its place.

A predecessor that does not know yet that it is fenced may write the next version too. It will not commit it. So

1. the folder that is there is opened;
2. a transaction shows that the run is still this process's (`Transactions.confirm`), so whoever wrote what was opened
   is a predecessor: a successor would have fenced this process before it wrote;
3. what was opened is emptied;
4. rename puts the own folder where an empty one is. Where there is another one again: from 1.

Whoever dies between two of these leaves a folder that the next start removes, as it does any that is not committed: it
has its state.json, or nothing. Whoever sleeps between two of them, and wakes up fenced, empties nothing but what it had
opened: a successor's folder of that name is another one.

A run of the same name on another log (a broker, a topic_prefix) may write to the same place. What it wrote it may have
committed, so that is left alone, and this process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fulgurite.schemas.errors import Fenced
from fulgurite.streams.trainer.run_state import STATE, RunState


class Occupied(Fenced):
    """Who owns the run may take the folder's place (`Checkpoints.replace`), everybody else must end."""

    def __init__(self, message: str, folder: Path, state: RunState, temporary: Path, opened: int) -> None:
        super().__init__(message)
        self.folder = folder
        self.state = state
        """Of the own version, which is whole under its temporary name."""
        self.temporary = temporary
        self._opened = opened

    def empty(self) -> None:
        """3."""
        empty(self._opened)

    def close(self) -> None:
        os.close(self._opened)


def occupied(folder: Path, state: RunState, temporary: Path) -> Fenced:
    """1. Plain Fenced where it cannot be told that the other one's was written for the same log."""
    fenced = Fenced(f"another process wrote {folder}: it may own run {state.run_id} now")
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return fenced
    theirs = read_state(opened)
    lineage = theirs.lineage if theirs else ""
    if lineage and lineage == state.lineage:
        return Occupied(str(fenced), folder, state, temporary, opened)
    os.close(opened)
    return fenced


def read_state(opened: int) -> RunState | None:
    """state.json of a version's folder that was opened; None where it cannot be told."""
    try:
        with open(STATE, opener=lambda name, flags: os.open(name, flags, dir_fd=opened)) as file:
            return RunState.model_validate_json(file.read())
    except (OSError, ValueError):
        return None


def empty(opened: int) -> None:
    """A version's folder that was opened, be others at it, too. state.json goes last, when nothing else is left: a
    folder with something in it but without that would be taken for one of another log."""
    while found := _entries(opened):
        with contextlib.suppress(FileNotFoundError):
            if found[0].is_dir(follow_symlinks=False):
                shutil.rmtree(found[0].name, dir_fd=opened)
            else:
                os.unlink(found[0].name, dir_fd=opened)


def _entries(opened: int) -> list[os.DirEntry[str]]:
    with os.scandir(opened) as entries:
        return sorted(entries, key=lambda entry: entry.name == STATE)

"""What a start finds beyond the last committed version, and how it removes that and nothing of a successor's.

Between asking the log and looking at the disk a start may sleep, as it may anywhere; then a second one may have taken
the run over and committed, and what lies there is that one's. So

1. what is half written is listed: it has a random name, which nobody will use again. Versions do not, so their folders
   are opened; and judged as they are then;
2. a transaction shows that the run is still this process's (`Transactions.confirm`), so whoever wrote what was found is
   a predecessor, whose transactions are over: no version among it is committed, or will be;
3. the start is refused, where a folder was found that no crash leaves. Otherwise what is half written is removed by
   name, and versions are emptied, each through what was opened: a successor's folder of that name is another one. An
   empty folder harms nobody, and rmdir takes no other one.

Whoever dies in 3 leaves what the next start finds: half a folder under a temporary name, or a version that has its
state.json, or nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from fulgurite.schemas.errors import StartError
from fulgurite.streams.trainer.occupied import empty

Judge = Callable[[Path, int], str]
"""Of a version's folder, opened: why it cannot be what a crash left; nothing where it can be."""


class Leftovers:
    """To be closed. False where there are none."""

    def __init__(self, half_written: list[Path], versions: Iterable[Path], judge: Judge) -> None:
        """1."""
        self._half_written = half_written
        self._versions: list[tuple[Path, int]] = []
        self._refusal = ""
        try:
            for folder in versions:
                with contextlib.suppress(FileNotFoundError):  # a predecessor or successor was at it, too
                    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                    self._versions.append((folder, opened))
                    self._refusal = self._refusal or judge(folder, opened)
        except BaseException:
            self.close()
            raise

    def __bool__(self) -> bool:
        return bool(self._half_written or self._versions)

    def remove(self) -> list[Path]:
        """3. Only for who has confirmed, since this was made, that it owns the run. Raises StartError, and removes
        nothing, where there is more than a crash can leave. Gives what was found."""
        try:
            if self._refusal:
                raise StartError(self._refusal)
            for path in self._half_written:
                _remove_half_written(path)
            for folder, opened in self._versions:
                empty(opened)
                with contextlib.suppress(OSError):  # gone, or another one: who needs the place asks whose it is
                    folder.rmdir()
            return [*self._half_written, *(folder for folder, _ in self._versions)]
        finally:
            self.close()

    def close(self) -> None:
        while self._versions:
            os.close(self._versions.pop()[1])


def _remove_half_written(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # it has just got its own name
        if path.is_dir():
            # Renamed first: a predecessor that still writes into it would put a file where none must be left.
            shutil.rmtree(path.rename(path.with_name(f"{path.name}-{secrets.token_hex(4)}")))
        else:
            path.unlink()

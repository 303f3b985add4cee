"""A lock on a folder: one owner at a time, released by the kernel when the owner and its heirs are gone.

There is nothing stale to clean up after a crash: the lock is flock's, the file's text only says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from fulgurite.schemas.errors import StartError


class FolderLock:
    """Held from creation until close(). A child that inherits `fileno` keeps it held until it, too, is gone."""

    def __init__(self, folder: Path, what: str, wait_seconds: float = 0.0) -> None:
        """Raises StartError: the folder cannot be written (a full disk, too), or somebody else holds it."""
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.fileno = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"{what}: cannot write in the data folder {folder}: {error.strerror}") from error
        try:
            deadline = time.monotonic() + wait_seconds
            while not self._take():
                if time.monotonic() > deadline:
                    holder = os.pread(self.fileno, 200, 0).decode(errors="replace").strip() or "another process"
                    raise StartError(f"{what}: the data folder {folder} is in use by {holder}")
                time.sleep(0.05)
            os.ftruncate(self.fileno, 0)
            os.pwrite(self.fileno, f"{what} (pid {os.getpid()})\n".encode(), 0)
        except OSError as error:
            self.close()
            raise StartError(f"{what}: cannot lock the data folder {folder}: {error.strerror}") from error
        except BaseException:
            self.close()  # a descriptor left open would keep the lock
            raise

    def _take(self) -> bool:
        try:
            fcntl.flock(self.fileno, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if self.fileno >= 0:
            os.close(self.fileno)
            self.fileno = -1

"""Room on the disk for the embedded ClickHouse: it is kept off a full disk, and what a full disk broke is named.

The engine of chdb-core 26.9.0 goes on when a write fails with ENOSPC: a definition or a merged part that the disk had
no room for is renamed into place empty, and the part's sources, with rows that were acknowledged, are dropped. So

    free < KEEP_FREE_BYTES   the engine itself refuses inserts and merges (NOT_ENOUGH_SPACE), and still answers
    free < END_FREE_BYTES    its process ends itself, and is not started: whatever else fills the disk finds it gone

What this cannot stop is a disk that loses the difference within WATCH_SECONDS. A definition lost that way is seen at
the next start, which names the file. Imports nothing heavy: the engine's own process uses it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fulgurite.schemas.errors import StartError

_MIB = 1024 * 1024
KEEP_FREE_BYTES = 128 * _MIB
END_FREE_BYTES = 64 * _MIB
WATCH_SECONDS = 0.2


def check_room(folder: Path) -> None:
    """Raises StartError on a disk that is nearly full."""
    if too_little := _too_little(folder):
        raise StartError(f"ClickHouse is not started: {too_little}")


def wait_until_full(folder: Path) -> str:
    """Returns when the disk is nearly full, with words for it."""
    while not (too_little := _too_little(folder)):
        time.sleep(WATCH_SECONDS)
    return too_little


def check_definitions(data: Path) -> None:
    """Raises StartError naming definitions that a full disk emptied: the engine would not start because of them."""
    empty = [path for path in _definitions(data) if not path.stat().st_size]
    if not empty:
        return
    files = "\n".join(f"  {path}" for path in empty)
    raise StartError(
        f"ClickHouse cannot start: definitions of its databases or tables are empty, which it leaves when the disk is "
        f"full:\n{files}\n"
        "If tables were being made then (a first start or an upgrade), delete these files and start again: the "
        f"migrations complete the rest. Otherwise put back a copy of {data.parent}, or move that folder away: a new, "
        "empty ClickHouse is filled again with what Kafka still has."
    )


def _too_little(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    if free >= END_FREE_BYTES:
        return ""
    return f"the disk of {folder} is full ({free // _MIB} MiB free; at least {END_FREE_BYTES // _MIB}): free some space"


def _definitions(data: Path) -> Iterator[Path]:
    """Of databases, and of what is in them."""
    yield from sorted((data / "metadata").glob("*.sql"))
    yield from sorted((data / "store").glob("*/*/*.sql"))

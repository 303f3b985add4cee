"""The embedded engine and a disk that fills up while it runs: it is gone before it can do damage, and comes back whole.

A real file system of 200 MiB in memory, where one may be mounted; elsewhere (not root) those tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fulgurite.infra import clickhouse_room
from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.clickhouse_room import END_FREE_BYTES, KEEP_FREE_BYTES
from fulgurite.schemas.errors import StartError

TABLE = "CREATE TABLE t.rows (x UInt64) ENGINE = MergeTree ORDER BY x"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={(KEEP_FREE_BYTES >> 20) + 72}m", "tmpfs", str(folder)]
        subprocess.run(mounting, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def _fill(folder: Path, leave: int) -> None:
    free = shutil.disk_usage(folder).free
    with (folder / f"filler-{leave}").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)


def test_a_disk_that_fills_up_ends_the_engine_and_loses_nothing(small_disk: Path) -> None:
    with EmbeddedClickHouse(small_disk / "clickhouse") as server:
        server.command("CREATE DATABASE t ENGINE = Atomic")
        server.command(TABLE)
        server.command("INSERT INTO t.rows SELECT number FROM numbers(1000)")
        _fill(small_disk, leave=(KEEP_FREE_BYTES + END_FREE_BYTES) // 2)
        with pytest.raises(StartError, match="NOT_ENOUGH_SPACE"):
            server.command("INSERT INTO t.rows SELECT 1")
        assert server.command("SELECT count() FROM t.rows").strip() == "1000"
        _fill(small_disk, leave=END_FREE_BYTES // 2)
        assert server.wait(10) == StartError.exit_code
        words = r"the disk of .* is full \(\d+ MiB free; at least 64\): free some space"
        with pytest.raises(StartError, match=f"ClickHouse is not started: {words}"):
            server.start()
        for filler in small_disk.glob("filler-*"):
            filler.unlink()
        server.start()
        server.command("INSERT INTO t.rows SELECT 1000")
        assert server.command("SELECT count() FROM t.rows").strip() == "1001"


def test_the_process_says_why_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([END_FREE_BYTES, END_FREE_BYTES, END_FREE_BYTES - 1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    monkeypatch.setattr(clickhouse_room, "WATCH_SECONDS", 0.0)
    assert "is full (63 MiB free; at least 64)" in clickhouse_room.wait_until_full(tmp_path)


@pytest.mark.parametrize("emptied", ["metadata/t.sql", "store/*/*/rows.sql"])
def test_a_definition_that_a_full_disk_emptied_is_named_with_what_to_do(tmp_path: Path, emptied: str) -> None:
    """The contract of the engine, too: once it starts over such a file, this is not needed any more."""
    with EmbeddedClickHouse(tmp_path) as server:
        server.command("CREATE DATABASE t ENGINE = Atomic")
        server.command(TABLE)
    [path] = (tmp_path / "data").glob(emptied)
    definition = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(StartError, match=f"(?s)are empty, which it leaves when the disk is full:\n  {path}\n.*delete"):
        server.start()
    path.write_bytes(definition)
    with server:
        assert server.command("SELECT count() FROM t.rows").strip() == "0"

"""`fulgurite up`, `status`, `down` as a user runs them, and what kill -9 of `up` leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fulgurite.infra.processes import wait_until
from fulgurite.infra.state import RunState, read_state
from fulgurite.infra.stores import hold_folder
from fulgurite.schemas.settings import ENV_HOME, ENV_PREFIX


def _fulgurite(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return subprocess.run(
        [sys.executable, "-m", "fulgurite.infra", *arguments],
        env=inherited | {ENV_HOME: str(data), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=170,
    )


def _running(data: Path) -> RunState:
    state = read_state(data)
    assert state is not None
    return state


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_up_survives_its_children_and_nothing_survives_up(tmp_path: Path) -> None:
    done = _fulgurite(tmp_path, "up", "--set", "kafka.partitions=2")
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        state = _running(tmp_path)
        assert "Already up" in _fulgurite(tmp_path, "up").stdout
        assert "fulgurite.spans" in _fulgurite(tmp_path, "status").stdout

        # Both stores are killed: they come back at the same addresses.
        for child in state.children:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        assert wait_until(lambda: [child.restarts for child in _running(tmp_path).children] == [1, 1], 90)
        assert _fulgurite(tmp_path, "status").returncode == 0

        # `up` itself is killed: its children die with it, its state is stale, and the next `up` works.
        children = [child.pid for child in _running(tmp_path).children]
        os.kill(state.owner.pid, signal.SIGKILL)
        assert wait_until(lambda: not any(psutil.pid_exists(pid or 0) for pid in children), 20)
        assert read_state(tmp_path) is None
        assert "Nothing runs" in _fulgurite(tmp_path, "down").stdout
        again = _fulgurite(tmp_path, "up")
        assert again.returncode == 0, again.stdout + again.stderr
        assert _running(tmp_path).kafka == state.kafka
        assert "all topics exist" in again.stdout
    finally:
        down = _fulgurite(tmp_path, "down")
    assert "Stopped Kafka and ClickHouse" in down.stdout, down.stdout + down.stderr
    assert read_state(tmp_path) is None


def test_a_folder_in_use_names_its_holder(tmp_path: Path) -> None:
    lock = hold_folder(tmp_path, "fulgurite demo")
    try:
        for command in ("up", "down"):
            done = _fulgurite(tmp_path, command)
            assert done.returncode == 3
            assert f"in use by fulgurite demo (pid {os.getpid()})" in done.stderr
    finally:
        lock.close()


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = _fulgurite(tmp_path / "file" / "data", "up")
    assert (done.returncode, "cannot write in the data folder" in done.stderr) == (3, True), done.stderr

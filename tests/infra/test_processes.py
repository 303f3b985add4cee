"""Children that die with their parent, locks and ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fulgurite.infra.folder_lock import FolderLock
from fulgurite.infra.ports import free_port, is_free, remembered_ports
from fulgurite.infra.processes import ChildProcess, start_process, tail, wait_until
from fulgurite.infra.state import ProcessRef, RunState, read_state, write_state
from fulgurite.schemas.errors import StartError

SLEEPER = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]


def test_output_goes_to_the_log_and_stop_is_prompt(tmp_path: Path) -> None:
    child = start_process("sleeper", SLEEPER, tmp_path / "logs" / "sleeper.log")
    assert wait_until(lambda: child.log_tail() == "here", 20)
    assert child.running
    assert child.stop() == -signal.SIGTERM
    assert not child.running


def test_a_child_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(grandchild.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    child = start_process("stubborn", [sys.executable, "-c", code], tmp_path / "log")
    assert wait_until(lambda: child.log_tail().isdigit(), 20)
    grandchild = int(child.log_tail())
    assert child.stop(timeout_seconds=0.3) == -signal.SIGKILL
    assert wait_until(lambda: _gone(grandchild), 10)


@pytest.mark.chaos
def test_children_are_gone_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fulgurite.infra.processes import start_process\n"
        f"log = Path({str(tmp_path)!r}) / 'log'\n"
        "child = start_process('c', [sys.executable, '-c', 'import time; time.sleep(600)'], log)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    assert wait_until(lambda: _gone(child), 10)


def test_a_child_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    # The kernel's parent-death signal fires when the starting thread ends: children are started by one that does not.
    started: list[ChildProcess] = []
    thread = threading.Thread(target=lambda: started.append(start_process("c", SLEEPER, tmp_path / "log")))
    thread.start()
    thread.join()
    try:
        assert wait_until(lambda: started[0].log_tail() == "here", 20)
        time.sleep(0.2)
        assert started[0].running
    finally:
        started[0].kill()


def test_a_missing_program_and_an_unwritable_log_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="there is no program /no/such"):
        start_process("ghost", ["/no/such"], tmp_path / "log")
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="ghost cannot be started"):
        start_process("ghost", SLEEPER, tmp_path / "file" / "log")


def test_a_large_log_is_rotated_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulgurite.infra.processes.MAX_LOG_BYTES", 10)
    log = tmp_path / "log"
    log.write_text("x" * 11)
    child = start_process("c", SLEEPER, log)
    try:
        assert wait_until(lambda: tail(log) == "here", 20)
        assert (tmp_path / "log.1").read_text() == "x" * 11
    finally:
        child.kill()


def test_a_folder_has_one_owner_and_says_who(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "the first")
    try:
        with pytest.raises(StartError, match=rf"in use by the first \(pid {os.getpid()}\)"):
            FolderLock(tmp_path, "the second")
    finally:
        lock.close()
    FolderLock(tmp_path, "the second").close()


def test_a_child_that_inherited_the_lock_keeps_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "the first")
    child = start_process("heir", SLEEPER, tmp_path / "log", keep_open=(lock.fileno,))
    lock.close()
    with pytest.raises(StartError, match="in use"):
        FolderLock(tmp_path, "the second")
    child.kill()
    FolderLock(tmp_path, "the second", wait_seconds=5).close()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot write in the data folder"):
        FolderLock(tmp_path / "file" / "data", "anybody")


def test_ports_are_remembered_while_they_are_free(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    first = remembered_ports(file, ("a", "b"), None, "test")
    assert first == remembered_ports(file, ("a", "b"), None, "test")
    with socket.create_server(("127.0.0.1", first["a"])):
        assert not is_free(first["a"])
        other = remembered_ports(file, ("a", "b"), None, "test")
        assert other["a"] != first["a"]
        assert other["b"] == first["b"]
        with pytest.raises(StartError, match=rf"port {first['a']} on 127.0.0.1 is taken"):
            remembered_ports(file, ("a", "b"), first["a"], "test")
    file.write_text("{broken")
    assert set(remembered_ports(file, ("a", "b"), None, "test")) == {"a", "b"}


def test_free_ports_lie_below_those_of_outgoing_connections() -> None:
    assert all(free_port() < 32_768 for _ in range(20))


def test_a_pid_given_to_a_stranger_is_not_ours(tmp_path: Path) -> None:
    ours = ProcessRef.current()
    assert ours.alive()
    assert not ProcessRef(pid=os.getpid(), started="another boot:1").alive()
    assert not ProcessRef(pid=2**22 + 1, started=ours.started).alive()
    write_state(tmp_path, RunState(owner=ProcessRef(pid=1, started="another boot:1"), ready=True))
    assert read_state(tmp_path) is None
    (tmp_path / "run" / "state.json").write_text("{torn")
    assert read_state(tmp_path) is None


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

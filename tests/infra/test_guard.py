"""The guard: whatever ends, nothing below it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from fulgurite.infra.guard import __file__ as guard
from fulgurite.infra.processes import ChildProcess, start_process, wait_until

# A server with an engine of its own, in a session of its own, that has a worker; pids go to a file.
SERVER = """
import os, subprocess, sys, time
WORKER = "import time; time.sleep(600)"
ENGINE = (
    "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
    "print(os.getpid(), p.pid, file=open(sys.argv[2], 'a'), flush=True); time.sleep(600)"
)
subprocess.Popen([sys.executable, "-c", ENGINE, WORKER, sys.argv[1]], start_new_session=True)
while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read().endswith("\\n"):
    time.sleep(0.01)
print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
exec(sys.argv[2])
"""
FOR_EVER = "time.sleep(600)"


def start(folder: Path, then: str = FOR_EVER) -> tuple[ChildProcess, list[int]]:
    """A guarded server, and the pids of its engine, its worker and itself."""
    pids = folder / "pids"
    command = [sys.executable, "-I", "-S", guard, sys.executable, "-c", SERVER, pids, then]
    child = start_process("guarded", command, folder / "log")
    assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 3, 20), child.log_tail()
    return child, [int(pid) for pid in pids.read_text().split()]


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def gone(pids: list[int]) -> bool:
    return wait_until(lambda: not running(pids), 10)


def test_a_killed_server_leaves_nothing(tmp_path: Path):
    child, pids = start(tmp_path)
    os.kill(pids[-1], signal.SIGKILL)
    assert child.wait(10) == 128 + signal.SIGKILL
    assert gone(pids)


def test_shared_memory_of_a_killed_server_is_removed(tmp_path: Path):
    shares = "from multiprocessing.shared_memory import SharedMemory as S; s = S(create=True, size=4096);"
    name = tmp_path / "name"
    child, pids = start(tmp_path, f"{shares} print(s.name, file=open({str(name)!r}, 'w'), flush=True); {FOR_EVER}")
    assert wait_until(lambda: name.exists() and name.read_text().endswith("\n"), 10)
    segment = Path("/dev/shm") / name.read_text().strip()
    assert segment.exists()
    os.kill(pids[-1], signal.SIGKILL)
    assert child.wait(10) == 128 + signal.SIGKILL
    assert not segment.exists()


def test_a_server_that_stops_by_itself_is_no_success(tmp_path: Path):
    child, pids = start(tmp_path, "sys.exit(0)")
    assert child.wait(10) == 1
    assert gone(pids)


def test_a_stop_is_handed_on_and_is_a_success(tmp_path: Path):
    child, pids = start(tmp_path, f"import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); {FOR_EVER}")
    assert child.stop() == 0
    assert gone(pids)


def test_a_killed_parent_leaves_nothing(tmp_path: Path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, guard, sys.executable, SERVER, tmp_path], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(running(pids)) == 4
        parent.kill()
        parent.wait()
        assert gone(pids)


PARENT = """
import sys, time
from pathlib import Path
from fulgurite.infra.processes import start_process
guard, python, server, folder = sys.argv[1:]
pids = Path(folder) / "pids"
command = [python, "-I", "-S", guard, python, "-c", server, str(pids), "time.sleep(600)"]
child = start_process("guarded", command, Path(folder) / "log")
while not pids.exists() or len(pids.read_text().split()) < 3:
    time.sleep(0.01)
print(child.pid, pids.read_text().replace("\\n", " "), flush=True)
time.sleep(600)
"""

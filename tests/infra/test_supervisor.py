"""Restarts, fatal ends, order of stopping, memory."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fulgurite.infra.processes import wait_until
from fulgurite.infra.supervisor import ServiceStatus, Supervisor


class Events:
    """What the supervisor told, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, name: str, what: str) -> None:
        self.seen.append((name, what))


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def supervisor(tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr("fulgurite.infra.supervisor.FIRST_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr("fulgurite.infra.supervisor._POLL_SECONDS", 0.02)
    supervisor = Supervisor(tmp_path, events)
    yield supervisor
    supervisor.stop_all()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


SLEEP = python("import time; time.sleep(600)")


def one(supervisor: Supervisor, name: str) -> ServiceStatus:
    return next(status for status in supervisor.status() if status.name == name)


@pytest.mark.chaos
def test_a_killed_service_is_started_again(supervisor: Supervisor) -> None:
    supervisor.start("sleeper", SLEEP)
    first = one(supervisor, "sleeper").pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: one(supervisor, "sleeper").restarts == 1, 20)
    status = one(supervisor, "sleeper")
    assert status.state == "running"
    assert status.pid not in (None, first)
    assert status.exit_code == -signal.SIGKILL


def test_restarts_wait_longer_and_longer(supervisor: Supervisor, events: Events) -> None:
    supervisor.start("crasher", python("import sys; sys.exit(1)"))
    assert wait_until(lambda: one(supervisor, "crasher").restarts >= 3, 30)
    delays = [float(what.split("starts again in ")[1].split(" s")[0]) for _, what in events.seen if "again in" in what]
    assert delays[:3] == sorted(delays[:3])
    assert delays[2] > delays[0]


def test_success_is_done_and_not_repeated(supervisor: Supervisor) -> None:
    supervisor.start("once", python("pass"))
    assert supervisor.wait("once", 20) == 0
    assert one(supervisor, "once").state == "done"
    assert one(supervisor, "once").restarts == 0


@pytest.mark.parametrize("code", [2, 4])
def test_what_a_restart_would_not_mend_is_fatal(supervisor: Supervisor, code: int) -> None:
    supervisor.start("wrong", python(f"import sys; sys.exit({code})"))
    assert supervisor.wait("wrong", 20) == code
    assert one(supervisor, "wrong").state == "failed"
    assert one(supervisor, "wrong").restarts == 0


def test_a_fenced_service_waits_long_before_it_tries_again(supervisor: Supervisor, events: Events) -> None:
    supervisor.start("fenced", python("import sys; sys.exit(5)"))
    assert wait_until(lambda: one(supervisor, "fenced").state == "waiting", 20)
    assert wait_until(lambda: any("another process took over" in what for _, what in events.seen), 20)
    (what,) = [what for _, what in events.seen if "starts again in" in what]
    assert float(what.split("starts again in ")[1].split(" s")[0]) >= 10


class FullDisk:
    """A store whose first restarts find no space."""

    def __init__(self, log: Path) -> None:
        self.pid, self.log = 1, log
        self.starts = 0
        self._code: int | None = 1

    def start(self) -> None:
        self.starts += 1
        if self.starts < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._code = None

    def stop(self) -> None:
        self._code = 0

    def wait(self, timeout_seconds: float) -> int | None:
        if self._code is None:
            time.sleep(timeout_seconds)
        return self._code


def test_no_space_ends_neither_the_watch_nor_the_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulgurite.infra.supervisor.FIRST_BACKOFF_SECONDS", 0.05)

    def listener(name: str, what: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    supervisor, store = Supervisor(tmp_path, listener), FullDisk(tmp_path / "log")
    supervisor.watch("store", store)
    assert wait_until(lambda: one(supervisor, "store").restarts == 1, 20)
    assert store.starts == 3
    supervisor.stop_all()


def test_all_are_stopped_the_last_first(tmp_path: Path, events: Events) -> None:
    supervisor = Supervisor(tmp_path, events)
    for name in ("a", "b", "c"):
        supervisor.start(name, SLEEP)
    pids = [status.pid for status in supervisor.status()]
    supervisor.stop_all()
    assert [name for name, what in events.seen if what == "stopped"] == ["c", "b", "a"]
    assert {status.state for status in supervisor.status()} == {"stopped"}
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    supervisor.start("late", SLEEP)  # a start that was under way: it must not survive
    assert all(status.name != "late" for status in supervisor.status())


def test_environment_log_and_memory(supervisor: Supervisor, tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['ANSWER'], flush=True); time.sleep(600)"
    supervisor.start("env", python(code), env={"ANSWER": "42"})
    assert wait_until(lambda: (tmp_path / "env.log").read_text() == "42\n", 20)
    status = one(supervisor, "env")
    assert status.rss_bytes > 1_000_000
    assert supervisor.rss_bytes() > status.rss_bytes
    assert supervisor.peak_rss_bytes >= supervisor.rss_bytes() * 0.5

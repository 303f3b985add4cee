"""Keeps services running: starts each as a child process, restarts those that die, stops all in reverse order.

    start ──► running ──exit 0──────────► done
                │  ▲ ──exit 2 or 4──────► failed    (a wrong setting or probabilities that disagree: the same again)
      anything  │  │
      else      ▼  │ backoff 0.5 s .. 10 s, reset after 30 s of running
              waiting     (after exit 5, Fenced, 15 s at least: started again at once, two would fence each other)

One thread a service waits for its process; processes.py sees to it that none outlives this one. Knows commands and
components that can be started again (the embedded stores), not what they do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fulgurite.infra.memory import tree_rss_bytes
from fulgurite.infra.processes import ChildProcess, start_process
from fulgurite.schemas.errors import Fenced, FulguriteError, LogprobMismatch, SettingsError

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 10.0
STABLE_SECONDS = 30.0
"""A service that ran this long starts again without delay's growth."""

FENCED_BACKOFF_SECONDS = 15.0
"""Another process took over. It may be gone by then, so it is tried again; but the owner gets time to work."""

FATAL_EXIT_CODES = frozenset({SettingsError.exit_code, LogprobMismatch.exit_code})
STOP_SECONDS = 10.0
_SAMPLE_SECONDS = 1.0
_POLL_SECONDS = 0.2

State = Literal["running", "waiting", "done", "failed", "stopped"]
Event = Callable[[str, str], None]
"""Told (service, what happened) of every start, end and restart, by the services' threads. What it raises is logged."""


class Component(Protocol):
    """What can be supervised beside a plain command: the embedded stores."""

    @property
    def pid(self) -> int | None: ...
    @property
    def log(self) -> Path: ...
    def start(self) -> object: ...
    def stop(self) -> None: ...
    def wait(self, timeout_seconds: float) -> int | None: ...


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service as it stands."""

    name: str
    state: State
    pid: int | None
    restarts: int
    exit_code: int | None
    """Of its last end; minus a signal's number."""
    rss_bytes: int
    up_seconds: float
    log: Path
    error: str
    """Why the last start failed, if it did."""


class Supervisor:
    """Starts, watches and stops services. Threads may call it freely. stop_all() ends it."""

    def __init__(self, logs: Path, on_event: Event | None = None) -> None:
        """A service's output goes to <logs>/<name>.log."""
        self._logs = logs
        self._on_event: Event = on_event or _log_event
        self._services: dict[str, _Service] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._peak_rss_bytes = 0
        self._sampler = threading.Thread(target=self._sample, name="memory", daemon=True)
        self._sampler.start()

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        """Starts a command and keeps it running. `env` is its whole environment. Raises StartError."""
        component = _Command(name, command, self._logs / f"{name}.log", env)
        component.start()
        self.watch(name, component)

    def watch(self, name: str, component: Component) -> None:
        """Keeps a component that was already started running."""
        service = _Service(name, component, self._on_event)
        with self._lock:
            if self._stopping.is_set():  # a start that was under way when everything was stopped
                component.stop()
                return
            assert name not in self._services or not self._services[name].active, f"{name} is already supervised"
            self._services[name] = service
        service.begin()

    def status(self) -> list[ServiceStatus]:
        """All services, in the order in which they were started."""
        with self._lock:
            services = list(self._services.values())
        return [service.status() for service in services]

    def wait(self, name: str, timeout_seconds: float) -> int | None:
        """The exit code of a service that is done, failed or stopped; None while it is still kept running."""
        service = self._services[name]
        service.thread.join(timeout_seconds)
        return None if service.active else service.status().exit_code

    def stop(self, name: str) -> None:
        """Stops one service for good."""
        self._services[name].stop()

    def stop_all(self) -> None:
        """Stops all services, the last started first. Returns when none is left."""
        with self._lock:
            self._stopping.set()
            services = list(self._services.values())
        for service in services:  # from here on none is started again
            service.stopping.set()
        for service in reversed(services):
            service.stop()
        self._sampler.join()

    def rss_bytes(self) -> int:
        """Resident memory of this process and everything below it."""
        total = tree_rss_bytes()
        self._peak_rss_bytes = max(self._peak_rss_bytes, total)
        return total

    @property
    def peak_rss_bytes(self) -> int:
        """The highest total seen, looked at once a second."""
        return self._peak_rss_bytes

    def _sample(self) -> None:
        while not self._stopping.wait(_SAMPLE_SECONDS):
            self.rss_bytes()


class _Command:
    """A command line as a component."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None) -> None:
        self.log = log
        self._name, self._command, self._env = name, command, env
        self._process: ChildProcess | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.running else None

    def start(self) -> None:
        self._process = start_process(self._name, self._command, self.log, env=self._env)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(STOP_SECONDS)

    def wait(self, timeout_seconds: float) -> int | None:
        return self._process.wait(timeout_seconds) if self._process is not None else None


class _Service:
    """One service and the thread that watches it."""

    def __init__(self, name: str, component: Component, on_event: Event) -> None:
        self.name = name
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"supervise-{name}", daemon=True)
        self._component = component
        self._event = on_event
        self._changing = threading.Lock()  # a stop waits for a start under way
        self._state: State = "running"
        self._restarts = 0
        self._exit_code: int | None = None
        self._error = ""
        self._started_at = time.monotonic()

    @property
    def active(self) -> bool:
        return self._state in ("running", "waiting")

    def begin(self) -> None:
        self._tell(f"started (pid {self._component.pid})")
        self.thread.start()

    def status(self) -> ServiceStatus:
        pid = self._component.pid if self._state == "running" else None
        return ServiceStatus(
            name=self.name,
            state=self._state,
            pid=pid,
            restarts=self._restarts,
            exit_code=self._exit_code,
            rss_bytes=tree_rss_bytes(pid) if pid is not None else 0,
            up_seconds=time.monotonic() - self._started_at if pid is not None else 0.0,
            log=self._component.log,
            error=self._error,
        )

    def stop(self) -> None:
        self.stopping.set()
        while not self._changing.acquire(timeout=_POLL_SECONDS):
            self._abort_start()
        try:
            was_active = self.active
            self._component.stop()
        finally:
            self._changing.release()
        self.thread.join()
        if was_active:
            self._exit_code = self._component.wait(0.0)
            self._state = "stopped"
            self._tell("stopped")

    def _run(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while not self.stopping.is_set():
            code = self._component.wait(_POLL_SECONDS)
            if code is None:
                continue
            if self.stopping.is_set():
                return
            if time.monotonic() - self._started_at > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            delay = max(backoff, FENCED_BACKOFF_SECONDS) if code == Fenced.exit_code else backoff
            if self._ended(code, delay):
                return
            while not self.stopping.wait(delay):
                delay = backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                if self._start_again():
                    break

    def _ended(self, code: int, delay: float) -> bool:
        """Whether that was its last end."""
        self._exit_code = code
        if code == 0:
            self._state = "done"
            self._tell("done")
        elif code in FATAL_EXIT_CODES:
            self._state = "failed"
            self._tell(f"failed with exit code {code}, which a restart would not mend: {self._where()}")
        else:
            self._state = "waiting"
            how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
            if code == Fenced.exit_code:
                how += ": another process took over"
            self._tell(f"ended ({how}); starts again in {delay:.1f} s: {self._where()}")
        return not self.active

    def _start_again(self) -> bool:
        with self._changing:
            if self.stopping.is_set():
                return False
            try:
                self._component.start()
            except (FulguriteError, OSError) as error:  # a full disk, too, may have room later
                self._error = str(error)
                self._tell(f"could not start: {error}")
                return False
            self._restarts += 1
            self._error = ""
            self._started_at = time.monotonic()
            self._state = "running"
        self._tell(f"started again (pid {self._component.pid}, restart {self._restarts})")
        return True

    def _tell(self, what: str) -> None:
        """Whoever listens may fail (a full disk, a closed terminal): the service is kept running all the same."""
        try:
            self._event(self.name, what)
        except Exception as error:
            logger.warning("%s %s; this could not be reported: %r", self.name, what, error)

    def _abort_start(self) -> None:
        """A store may take a minute to become usable: nobody waits for that only to stop it."""
        if (pid := self._component.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _where(self) -> str:
        return f"see {self._component.log}"


def _log_event(service: str, what: str) -> None:
    with contextlib.suppress(ValueError):  # a stream closed at exit
        logger.info("%s %s", service, what)

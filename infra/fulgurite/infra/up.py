"""`fulgurite up` and `down`: the embedded stores as a background process of their own.

fulgurite up ──starts──► fulgurite up --foreground   (own session, outlives the terminal)
     │                        │ holds <data>/run/lock, supervises kafka and clickhouse,
     │ waits for "ready"      │ writes <data>/run/state.json and <data>/fulgurite.toml
     ▼                        ▼
  the prompt              until SIGTERM (`fulgurite down`) or Ctrl-C; its children die with it, kill -9 included
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.markup import escape

from fulgurite.infra.cli_common import next_steps, say
from fulgurite.infra.processes import wait_until
from fulgurite.infra.state import ChildState, ProcessRef, RunState, read_state, remove_state, write_state
from fulgurite.infra.stores import hold_folder, start_stores
from fulgurite.infra.supervisor import Supervisor
from fulgurite.producers.logs import configure_logging
from fulgurite.schemas.settings import Settings, home

logger = logging.getLogger(__name__)

_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.1


def run_foreground(data: Path, settings: Settings) -> int:
    """Starts the stores and keeps them running until a signal. Raises StartError."""
    configure_logging("up", settings.log)
    tell: Callable[[str], None] = logger.info if settings.log.format == "json" else _print
    lock = hold_folder(data, "fulgurite up")
    state = RunState(owner=ProcessRef.current())
    writing = threading.Lock()

    def changed(name: str, what: str) -> None:
        with writing:  # both stores' threads come here; the last to write has seen the other's change
            state.children = [
                ChildState(name=one.name, pid=one.pid, restarts=one.restarts, log=one.log, error=one.error)
                for one in supervisor.status()
            ]
            try:
                write_state(data, state)
            finally:
                tell(f"{name} {what}")

    supervisor = Supervisor(data / "logs", changed)
    stop = _Stop()
    try:
        write_state(data, state)
        stores = start_stores(data, settings, supervisor, tell)
        state.kafka, state.clickhouse, state.ready = stores.kafka.bootstrap_servers, stores.clickhouse.url, True
        changed("both", f"are usable; settings are in {stores.settings_file}")
        stop.wait()
        tell("stopping")
    except KeyboardInterrupt:
        tell("interrupted while starting")
        return 130
    finally:
        stop.ignore()
        supervisor.stop_all()
        remove_state(data)
        lock.close()
    tell("stopped; the data stays")
    return 0


def start_background(data: Path) -> int:
    """Starts run_foreground in a session of its own and waits until it is ready; relays what it says."""
    state = read_state(data)
    if state is not None and state.ready:
        say(f"Already up (pid {state.owner.pid}): Kafka at {state.kafka}, ClickHouse at {state.clickhouse}.")
        _what_next(data)
        return 0
    hold_folder(data, "fulgurite up").close()  # told here and now if somebody else holds it
    log = data / "logs" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"Starting Kafka and ClickHouse on {data} (log: {log})")
    with log.open("ab") as output:
        begin = output.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "fulgurite.infra", "up", "--foreground", "--data", str(data)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    relay = _relay(log, begin)
    try:
        while (state := read_state(data)) is None or not state.ready or state.owner.pid != child.pid:
            relay()
            if (code := child.poll()) is not None:
                relay()
                say(f"[red]Could not start[/]: see above and {escape(str(log))}")
                return code or 1
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        child.terminate()
        child.wait(_STOP_SECONDS)
        say("Interrupted; everything is stopped.")
        return 130
    relay()
    child.returncode = 0  # it goes on without us: not ours to wait for
    say(f"[green]Up[/] (pid {child.pid}): Kafka at {state.kafka}, ClickHouse at {state.clickhouse}.")
    _what_next(data)
    return 0


def stop_background(data: Path) -> int:
    """Stops the owner found in state.json, and only it: a stranger with the same pid is left alone."""
    state = read_state(data)
    if state is None:
        # Whoever else holds the folder (a demo) says so by its lock.
        hold_folder(data, "fulgurite down").close()
        remove_state(data)
        say(f"Nothing runs on {data}.")
        return 0
    owner = state.owner
    os.kill(owner.pid, signal.SIGTERM)
    if not wait_until(lambda: not owner.alive(), _STOP_SECONDS, _POLL_SECONDS):
        say(f"pid {owner.pid} did not stop within {_STOP_SECONDS:.0f} s: killing it and its children.")
        os.kill(owner.pid, signal.SIGKILL)
        wait_until(lambda: not owner.alive(), 5.0, _POLL_SECONDS)
        remove_state(data)
    say(f"Stopped Kafka and ClickHouse; the data stays in {data}.")
    next_steps(f"fulgurite up --data {data}    # brings it back")
    return 0


def _what_next(data: Path) -> None:
    at = "" if data == home({}).absolute() else f" --data {data}"
    next_steps(
        f"fulgurite status{at}", f"fulgurite topics list{at}", f'fulgurite sql "SHOW TABLES"{at}', f"fulgurite down{at}"
    )


class _Stop:
    """SIGTERM or SIGINT: ends wait(); before it, interrupts whatever the main thread does (a download, a start)."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._waiting = False
        self._set_handlers(self._handle)

    def wait(self) -> None:
        self._waiting = True
        self._event.wait()

    def ignore(self) -> None:
        """From now on: stopping is under way, and is not to be interrupted."""
        self._set_handlers(signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        if not self._waiting:
            raise KeyboardInterrupt

    def _set_handlers(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


def _print(text: str) -> None:
    print(text, flush=True)


def _relay(log: Path, position: int) -> Callable[[], None]:
    """Prints what was added to `log` since the last call."""

    def relay() -> None:
        nonlocal position
        with log.open("rb") as file:
            file.seek(position)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        position += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            say(f"  [dim]{escape(line)}[/]")

    return relay

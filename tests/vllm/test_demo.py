"""The demo on vLLM: an interrupt, or a kill, leaves none of its processes. That it learns, `make demo` shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TINY = ("--steps", "1", "--warm-start-steps", "10", "--eval-tasks", "4", "--greedy-tasks", "1", "--concurrency", "4")
ENGINE = "EngineCore"
"""In the title of vLLM's second process."""


def until(ready: Callable[[], bool], log: Path, seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3_000:]
        time.sleep(0.2)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_process(tmp_path: Path, number: signal.Signals):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "fulgurite.infra", "demo", "--serve", "vllm", "--data", str(tmp_path / "data")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FULGURITE_")}
    with log.open("wb") as output:
        demo = subprocess.Popen([*command, *TINY], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        below = psutil.Process(demo.pid)
        until(lambda: any(ENGINE in title(process) for process in below.children(recursive=True)), log)
        started = below.children(recursive=True)
        demo.send_signal(number)
        assert demo.wait(60) == (130 if number == signal.SIGINT else -number)
        until(lambda: not any(lives(process) for process in started), log, seconds=20.0)
    finally:
        demo.kill()
        demo.wait()

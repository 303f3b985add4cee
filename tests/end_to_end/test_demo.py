"""The demo as a user runs it, small: interrupted by kill -9, continued, every service killed, all accounts settled."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.demo import questions, state
from fulgurite.infra.sql import connect

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "--steps": 6,
    "--groups-per-step": 3,
    "--group-size": 4,
    "--eval-tasks": 12,
    "--greedy-tasks": 4,
    "--warm-start-steps": 240,
    "--concurrency": 8,
}
ROLLOUTS = 6 * 3 * 4
KILLED = ("train", "coordinator", "gateway", "assembler", "follower", "policy-server", "runner", "materialiser")
FINISHED = (0, 1)
"""1 says that the reward did not rise enough, which four steps cannot promise."""


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is right now and then: without any reward there is nothing to train on."""
    folder = tmp_path_factory.mktemp("warm") / "warm-start"
    options = ["--output", str(folder), "--steps", str(SMALL["--warm-start-steps"]), "--seed", "1"]
    command = [sys.executable, "-m", "examples.calculator.warm_start", *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=400, capture_output=True)
    return folder


@contextmanager
def demo(data: Path, log: Path) -> Generator[subprocess.Popen[bytes]]:
    options = [str(part) for option in SMALL.items() for part in option]
    command = [sys.executable, "-m", "fulgurite.infra", "demo", "--data", str(data), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FULGURITE_")}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def processes_on(data: Path) -> list[psutil.Process]:
    """Everything that works in or for this folder."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            place = process.cwd() + " " + process.environ().get("FULGURITE_HOME", "") + " ".join(process.cmdline())
            if str(data) in place and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def until(what: str, log: Path, pattern: str, process: subprocess.Popen[bytes], timeout_seconds: float = 240) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not re.search(pattern, log.read_text(errors="replace")):
        assert process.poll() is None, f"ended before {what}:\n{log.read_text(errors='replace')[-4000:]}"
        assert time.monotonic() < deadline, f"no {what}:\n{log.read_text(errors='replace')[-4000:]}"
        time.sleep(0.2)


def service(data: Path, name: str) -> psutil.Process | None:
    for process in processes_on(data):
        try:
            if process.cmdline()[-1:] == [name]:
                return process
        except psutil.Error:
            continue
    return None


def accounts(data: Path) -> dict[tuple[str, str], int]:
    """(outcome, reason) -> rollouts, and a check that no record became two rows."""
    run = state.load(data)
    assert run is not None
    server = EmbeddedClickHouse(data / "clickhouse")
    server.start()
    try:
        with connect(server.settings("fulgurite")) as client:
            rows = client.query(questions.ACCOUNTS, {"run_id": run.run_id}).result_rows
            doubled = client.query("SELECT sum(duplicates) FROM reconciliation").result_rows
            assert doubled[0][0] == 0
            return {(str(outcome), str(reason)): int(count) for outcome, reason, count in rows}
    finally:
        server.stop()


def assert_settled(found: dict[tuple[str, str], int]) -> None:
    """Every rollout trained on once, evaluated, or dropped with its reason."""
    by_outcome: dict[str, int] = {}
    for (outcome, reason), count in found.items():
        by_outcome[outcome] = by_outcome.get(outcome, 0) + count
        assert outcome != "dropped" or reason
    assert set(by_outcome) <= {"trained", "dropped", "evaluated"}, found
    assert by_outcome["evaluated"] == 2 * (12 + 4)
    assert found.get(("evaluated", "")) == by_outcome["evaluated"]
    assert by_outcome["trained"] > 0
    assert by_outcome["trained"] + by_outcome.get("dropped", 0) >= ROLLOUTS


def test_killed_and_run_again_and_every_service_killed_in_turn_it_goes_on_and_leaves_nothing_behind(
    tmp_path: Path, warm_start: Path
):
    data, log = tmp_path / "data", tmp_path / "log"
    killed: list[str] = []
    shutil.copytree(warm_start, data / "warm-start")
    with demo(data, log) as process:
        until("a step", log, r"GRPO steps [1-9]|✓ training", process)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while processes_on(data) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_on(data) == []
    with demo(data, log) as process:
        until("its continuation", log, r"it goes on where it stood[\s\S]*GRPO steps", process)
        for name in (*KILLED, "kafka", "clickhouse"):
            wait_for_process(data, name).kill()
            killed.append(name)
            time.sleep(1.0)
        assert process.wait(360) in FINISHED, log.read_text(errors="replace")[-6000:]
    text = log.read_text(errors="replace")
    assert "Reward by policy version" in text
    assert "Held-out sampled reward" in text
    assert [name for name in killed if f"{name.replace('train', 'trainer')} ended (killed" not in text] == []
    assert processes_on(data) == []
    assert_settled(accounts(data))


def wait_for_process(data: Path, name: str, timeout_seconds: float = 60) -> psutil.Process:
    deadline = time.monotonic() + timeout_seconds
    while True:
        victim = store(data, name) if name in ("kafka", "clickhouse") else service(data, name)
        if victim is not None:
            return victim
        assert time.monotonic() < deadline, f"{name} does not run"
        time.sleep(0.1)


def store(data: Path, name: str) -> psutil.Process | None:
    marks = {"kafka": "kafka.Kafka", "clickhouse": "clickhouse_child"}
    for process in processes_on(data):
        try:
            if marks[name] in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None

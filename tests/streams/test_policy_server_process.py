"""The process: starts empty or with a model, says why it cannot, ends promptly, and starts again after a kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.streams.policy_server_support import make_model

_START = (
    "from fulgurite.schemas.settings import load_settings; from fulgurite.streams.policy_server import main; "
    "raise SystemExit(main(load_settings()))"
)


@contextmanager
def process(port: int, model: Path | None = None) -> Generator[subprocess.Popen[str]]:
    env = os.environ | {"FULGURITE_POLICY_SERVER__PORT": str(port)}
    if model is not None:
        env["FULGURITE_POLICY_SERVER__MODEL"] = str(model)
    with subprocess.Popen([sys.executable, "-c", _START], env=env, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for(url: str, status: int) -> httpx.Response:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            response = httpx.get(url)
            if response.status_code == status:
                return response
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer {status}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_starts_empty_is_loaded_killed_started_with_a_model_and_stopped(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", 1)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    chat = {"model": "policy", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    with process(port) as running:
        wait_for(f"{url}/health", 503)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
        httpx.post(f"{url}/collective_rpc", json=body, timeout=30).raise_for_status()
        httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=30).raise_for_status()
        running.send_signal(signal.SIGKILL)
    with process(port, model) as running:
        wait_for(f"{url}/health", 200)
        httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=30).raise_for_status()
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_folder_that_is_no_model_ends_it_with_a_line_that_says_so(tmp_path: Path) -> None:
    with process(free_port(), tmp_path) as running:
        _, errors = running.communicate(timeout=120)
        assert running.returncode == 3
    assert "policy_server.model" in errors
    assert "no config.json" in errors
    assert "Traceback" not in errors

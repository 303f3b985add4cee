"""A real vLLM on CPU as a child process: started once a session, killed and started again where a test wants that."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from fulgurite.infra.ports import free_port
from fulgurite.infra.processes import ChildProcess, start_process
from fulgurite.infra.vllm import vllm_command, vllm_environment

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 400.0
"""A minute on two busy cores; and the first request ever compiles for half of one."""
OPTIONS = (
    "--max-num-seqs=32",
    "--max-num-batched-tokens=512",  # long prompts are prefilled in chunks, as in production
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--enable-lora",
    "--max-lora-rank=8",
    "--max-loras=2",
    '--weight-transfer-config={"backend": "nccl"}',
)
PLUGIN = str(Path(__file__).with_name("plugin"))
"""Goes on the path of vLLM and of the follower's sender: weight transfer without NCCL."""


class VllmServer:
    """Use as a context manager."""

    def __init__(self, model: Path, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._model = model
        self._log = log
        self._process: ChildProcess | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.stop(20)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def start(self) -> None:
        command = vllm_command(ROOT, self._model, self.port, OPTIONS)
        env = vllm_environment() | {"PYTHONPATH": PLUGIN}
        self._process = start_process("vllm", command, self._log, env=env)

    def kill(self) -> None:
        """SIGKILL to the server itself; its guard ends the engine. Returns when nothing of it is left."""
        assert self._process
        (server,) = psutil.Process(self._process.pid).children()
        below = server.children(recursive=True)
        assert len(below) >= 2, "no engine to be left behind"
        server.kill()
        assert self._process.wait(20) == 128 + signal.SIGKILL
        assert not any(process.is_running() for process in below)

    def wait_ready(self) -> None:
        """Returns when it has answered a request: the first one takes long."""
        assert self._process
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.running, f"vLLM ended:\n{self._process.log_tail(60)}"
            assert time.monotonic() < deadline, f"vLLM is not ready:\n{self._process.log_tail(60)}"
            time.sleep(0.5)

    def _answers(self) -> bool:
        body: dict[str, Any] = {"model": "policy", "prompt": "ready?", "max_tokens": 2}
        try:
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).status_code == 200
        except httpx.TransportError:
            return False

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = (await self._get("/metrics")).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    async def label(self) -> str:
        """Of the weights it serves."""
        return str((await self._get("/weight_info")).json()["weight_version"])

    async def unload_adapters(self) -> None:
        """All it has: the resource's name would mean the newest of them."""
        async with httpx.AsyncClient(base_url=self.url) as client:
            models = (await client.get("/v1/models")).raise_for_status().json()["data"]
            for model in models:
                if model.get("parent"):
                    await client.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]})

    async def _get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url) as client:
            return (await client.get(path)).raise_for_status()

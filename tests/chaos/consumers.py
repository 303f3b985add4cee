"""The materialisers of a chaos run, each a process of its own: started, frozen, killed, watched."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from fulgurite.infra.processes import ChildProcess, start_process, tail
from fulgurite.schemas.settings import ENV_HOME, ENV_PREFIX, Settings, to_environment


class Consumers:
    """Those that run; one that ends by itself is noted and replaced."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        values = {
            "kafka": settings.kafka.model_dump(include={"bootstrap_servers", "topic_prefix", "partitions"}),
            "clickhouse": {
                **settings.clickhouse.model_dump(include={"url", "user", "database"}),
                "password": settings.clickhouse.password.get_secret_value(),
            },
            "materialiser": settings.materialiser.model_dump(),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        self._environment = {**kept, ENV_HOME: str(folder), **to_environment(values)}
        self._folder = folder
        self._running: list[ChildProcess] = []
        self._started = 0
        self.ended: list[str] = []
        """How those ended that nobody had touched."""

    def __len__(self) -> int:
        return len(self._running)

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._running if child.running]

    def add(self) -> None:
        self._started += 1
        name = f"materialiser-{self._started}"
        command = [sys.executable, "-m", "fulgurite.infra", "materialiser"]
        log = self._folder / f"{name}.log"
        self._running.append(start_process(name, command, log, env=self._environment))

    def take(self, pick: float) -> ChildProcess:
        """One of those that run, no longer watched."""
        return self._running.pop(int(pick * len(self._running)))

    async def freeze(self, pick: float, seconds: float) -> None:
        child = self._running[int(pick * len(self._running))]
        os.kill(child.pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        if child in self._running:  # not killed meanwhile
            os.kill(child.pid, signal.SIGCONT)

    async def watch(self) -> None:
        while True:
            for child in [child for child in self._running if not child.running]:
                self._running.remove(child)
                self.ended.append(f"{child.name} ended with {child.returncode}:\n{tail(child.log, 12)}")
                self.add()
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        children, self._running = self._running, []
        await asyncio.gather(*(asyncio.to_thread(child.stop) for child in children))

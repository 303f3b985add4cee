"""What the ingestion benchmark measures with: a broker, an engine, a materialiser as a process, and what they cost."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import clickhouse_connect
import psutil
from aiokafka import AIOKafkaProducer
from clickhouse_connect.driver import Client

from fulgurite.infra.clickhouse import EmbeddedClickHouse
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.migrations import apply_migrations, connection_options
from fulgurite.schemas.settings import KafkaSettings, Settings, to_environment
from fulgurite.schemas.topics import Topic

PARTITIONS = 4
CALM_ANSWERS = 10
MATERIALISER = """
from fulgurite.consumers.materialiser import main
from fulgurite.schemas.settings import load_settings
raise SystemExit(main(load_settings()))
"""


@dataclass
class Cost:
    """CPU seconds of each process since the beginning, and their largest memory together."""

    processes: dict[str, psutil.Process]
    begun: dict[str, float] = field(default_factory=dict[str, float])
    peak_rss_bytes: int = 0

    def __post_init__(self) -> None:
        self.begun = {name: cpu_seconds(process) for name, process in self.processes.items()}
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            try:
                rss = sum(process.memory_info().rss for process in self.processes.values())
            except psutil.NoSuchProcess:
                continue
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss)

    def end(self) -> dict[str, float]:
        self._over.set()
        return {name: cpu_seconds(process) - self.begun[name] for name, process in self.processes.items()}


def quiet(clickhouse: EmbeddedClickHouse) -> None:
    """Until no merge runs, some times in a row."""
    calm = 0
    while calm < CALM_ANSWERS:
        time.sleep(0.2)
        running = clickhouse.command("SELECT count() FROM system.merges").strip() != "0"
        calm = 0 if running else calm + 1


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@dataclass(frozen=True)
class Rig:
    settings: Settings
    kafka: EmbeddedKafka
    clickhouse: EmbeddedClickHouse
    port: int
    """Where its materialiser serves /ready."""

    def client(self) -> Client:
        options = connection_options(self.settings.clickhouse)
        return clickhouse_connect.get_client(**options, database=self.settings.clickhouse.database)

    def fill(self, topic: Topic, load: Iterator[tuple[bytes, bytes]]) -> None:
        asyncio.run(self._fill(self.settings.kafka.topic(topic), load))

    async def _fill(self, name: str, load: Iterator[tuple[bytes, bytes]]) -> None:
        async with self.producer(linger_ms=20) as producer:
            for key, value in load:
                await producer.send(name, value, key)

    def producer(self, linger_ms: int, compression: str = "lz4") -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka.bootstrap_servers,
            acks="all",
            compression_type=compression,
            max_batch_size=1 << 20,
            linger_ms=linger_ms,
        )

    def materialiser(self) -> subprocess.Popen[bytes]:
        environment = to_environment(
            {
                "kafka": self.settings.kafka.model_dump(
                    include={"bootstrap_servers", "topic_prefix", "otlp_topic", "partitions"}
                ),
                "clickhouse": {
                    **self.settings.clickhouse.model_dump(include={"url", "user", "database"}),
                    "password": self.settings.clickhouse.password.get_secret_value(),
                },
                "materialiser": {"port": self.port},
            }
        )
        return subprocess.Popen(
            [sys.executable, "-c", MATERIALISER], env={**os.environ, **environment}, stderr=subprocess.DEVNULL
        )


def make_rig(name: str, kafka: EmbeddedKafka, clickhouse: EmbeddedClickHouse) -> Rig:
    """Topics and tables of its own."""
    settings = Settings(
        kafka=KafkaSettings(
            bootstrap_servers=kafka.bootstrap_servers,
            topic_prefix=f"{name}.",
            otlp_topic=f"{name}.otlp_spans",
            partitions=PARTITIONS,
        ),
        clickhouse=clickhouse.settings(name),
    )
    asyncio.run(create_topics(settings.kafka))
    apply_migrations(settings.clickhouse)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Rig(settings, kafka, clickhouse, int(listener.getsockname()[1]))


def processes(rig: Rig, child: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    pids = {"materialiser": child.pid, "kafka": rig.kafka.pid, "clickhouse": rig.clickhouse.pid}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def start_up(rig: Rig) -> dict[str, float]:
    """What each process spends until a materialiser with nothing to do is ready, and for how long: the second time, for
    the first one compiles and reads what later ones find, and what is taken off must not be too much."""
    _start_up(rig)
    return _start_up(rig)


def _start_up(rig: Rig) -> dict[str, float]:
    quiet(rig.clickhouse)
    begun = time.monotonic()
    with rig.materialiser() as child:
        cost = Cost(processes(rig, child))
        while not ready(rig.port):
            time.sleep(0.01)
        used = {**cost.end(), "seconds": time.monotonic() - begun}
        child.terminate()
        child.wait(30)
    return used


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False

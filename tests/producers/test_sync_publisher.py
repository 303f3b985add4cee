"""The synchronous publisher: threads, exits, forks; against the real broker."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fulgurite.producers.sync_publisher import SyncPublisher
from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import BufferFull, FulguriteError, RecordTooLarge, Undelivered
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings, to_environment
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import REWARDS, SPANS
from tests.producers.reading import read_topic


def a_span(number: int, rollout_id: str = "r1") -> Span:
    return Span(rollout_id=rollout_id, span_id=f"s{number}", name="step", start_ns=now_ns(), end_ns=now_ns())


async def test_threads_publish_in_order_and_close_delivers(kafka_settings: KafkaSettings) -> None:
    def write(publisher: SyncPublisher, rollout_id: str) -> None:
        for number in range(50):
            publisher.publish_span(a_span(number, rollout_id))

    publisher = SyncPublisher(kafka_settings)
    threads = [threading.Thread(target=write, args=(publisher, f"r{number}")) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    placed = publisher.publish_reward(Reward(rollout_id="r1", value=1.0)).result(10)
    assert placed.topic == kafka_settings.topic(REWARDS)
    publisher.flush()
    assert (publisher.delivered, publisher.failed, publisher.waiting) == (201, 0, 0)
    publisher.close()
    publisher.close()
    with pytest.raises(FulguriteError, match="closed"):
        publisher.publish_span(a_span(1))
    records = await read_topic(kafka_settings, SPANS)
    for rollout in ("r0", "r1", "r2", "r3"):
        ids = [decode(Span, record.value).span_id for record in records if record.key == rollout.encode()]
        assert ids == [f"s{number}" for number in range(50)]


def test_too_large_is_refused_in_the_callers_thread(kafka_settings: KafkaSettings) -> None:
    with SyncPublisher(kafka_settings.model_copy(update={"max_record_bytes": 1_024})) as publisher:
        with pytest.raises(RecordTooLarge):
            publisher.publish(SPANS, "r1", a_span(1).model_copy(update={"input": "x" * 2_000}))
        assert publisher.waiting == 0


def test_without_a_broker_publish_gives_up_after_its_wait_and_nothing_hangs() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        kafka = KafkaSettings(bootstrap_servers=f"127.0.0.1:{reserved.getsockname()[1]}")
        publisher = SyncPublisher(kafka, ProducerSettings(buffer_wait_seconds=0.3))
        with pytest.raises(BufferFull, match=r"did not answer within producer\.buffer_wait_seconds = 0\.3"):
            publisher.publish_span(a_span(1))
        publisher.close()


def run_script(kafka: KafkaSettings, body: str) -> subprocess.CompletedProcess[str]:
    script = "from fulgurite.producers.sync_publisher import *\nfrom fulgurite.schemas.settings import load_settings\n"
    script += "from fulgurite.schemas.topics import SPANS\nsettings = load_settings()\n"
    script += "publisher = SyncPublisher(settings.kafka, settings.producer)\n" + textwrap.dedent(body)
    environment = to_environment({"kafka": kafka.model_dump(exclude_none=True, exclude={"sasl_password"})})
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, **environment, "FULGURITE_PRODUCER__LINGER_MS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_a_script_that_ends_without_close_delivers_everything(kafka_settings: KafkaSettings) -> None:
    """Also over a host name: resolving it needs the thread pool that is gone when plain atexit runs."""
    named = kafka_settings.model_copy(
        update={"bootstrap_servers": kafka_settings.bootstrap_servers.replace("127.0.0.1", "localhost")}
    )
    done = run_script(
        named,
        """
        for number in range(100):
            publisher.publish_bytes(SPANS, b"r1", str(number).encode())
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [record.value for record in await read_topic(kafka_settings, SPANS)] == [
        str(number).encode() for number in range(100)
    ]


async def test_an_exception_still_delivers_what_was_accepted(kafka_settings: KafkaSettings) -> None:
    done = run_script(kafka_settings, 'publisher.publish_bytes(SPANS, b"r1", b"x")\nraise ValueError("end")')
    assert done.returncode == 1
    assert [record.value for record in await read_topic(kafka_settings, SPANS)] == [b"x"]


async def test_a_forked_child_starts_afresh(kafka_settings: KafkaSettings) -> None:
    done = run_script(
        kafka_settings,
        """
        import multiprocessing
        def child(number):
            publisher.publish_bytes(SPANS, b"r1", f"child {number}".encode())
        publisher.publish_bytes(SPANS, b"r1", b"before").result(10)
        publisher.publish_bytes(SPANS, b"r1", b"waiting")
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=child, args=(number,)) for number in range(2)]
        for one in children: one.start()
        for one in children: one.join(30)
        assert [one.exitcode for one in children] == [0, 0]
        publisher.publish_bytes(SPANS, b"r1", b"after")
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    values = [record.value or b"" for record in await read_topic(kafka_settings, SPANS)]
    assert sorted(values) == [b"after", b"before", b"child 0", b"child 1", b"waiting"]


@pytest.mark.chaos
@pytest.mark.slow
def test_what_could_not_be_delivered_is_reported_at_close_and_at_exit(tmp_path: Path) -> None:
    import asyncio

    from fulgurite.infra.kafka import EmbeddedKafka
    from fulgurite.infra.topics import create_topics

    with EmbeddedKafka(tmp_path) as server:
        kafka = KafkaSettings(bootstrap_servers=server.bootstrap_servers, partitions=1)
        asyncio.run(create_topics(kafka))
        publisher = SyncPublisher(kafka, ProducerSettings(delivery_seconds=1.0))
        publisher.publish_span(a_span(1)).result(10)
        script = (
            "import os, signal\n"
            "impatient = settings.producer.model_copy(update={'delivery_seconds': 1.0})\n"
            "publisher = SyncPublisher(settings.kafka, impatient)\n"
            "publisher.publish_bytes(SPANS, b'k', b'1').result(10)\n"
            f"os.kill({server.pid}, signal.SIGKILL)\n"
            "publisher.publish_bytes(SPANS, b'k', b'2')\n"
        )
        done = run_script(kafka, script)
        assert "fulgurite: at exit: 1 records were not acknowledged" in done.stderr
        publisher.publish_span(a_span(2))
        with pytest.raises(Undelivered, match="1 records"):
            publisher.close()

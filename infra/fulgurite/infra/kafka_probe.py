"""Asks a broker whether work is really possible: a transaction committed, its record read by a member of a group.

A port that answers is not enough: just after a start the group and transaction coordinators are still loading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import uuid
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from fulgurite.producers.kafka import connection_options
from fulgurite.producers.reading import fetch
from fulgurite.schemas.settings import KafkaSettings

PROBE_TOPIC = "__fulgurite_probe"
_PROBE_SECONDS = 15.0

T = TypeVar("T")


def is_usable(settings: KafkaSettings) -> bool:
    """One try at one broker; False where it did not work (yet)."""
    host, _, port = settings.bootstrap_servers.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    with _quiet_clients():
        try:
            run_in_thread(asyncio.wait_for(_probe(settings), _PROBE_SECONDS))
        except (KafkaError, TimeoutError, OSError):
            return False
    return True


def run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end in a loop of its own, also where the caller's thread already runs one."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="kafka-probe")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


async def _probe(settings: KafkaSettings) -> None:
    await _create_topic(settings)
    group = f"probe-{uuid.uuid4().hex}"
    producer = AIOKafkaProducer(
        **connection_options(settings), transactional_id="fulgurite-probe", acks="all", linger_ms=0
    )
    try:
        await producer.start()
        async with producer.transaction():
            sent = await producer.send_and_wait(PROBE_TOPIC, group.encode())
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer(
        PROBE_TOPIC,
        **connection_options(settings),
        group_id=group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        isolation_level="read_committed",
    )
    try:
        await consumer.start()
        # A record that nobody can decode, whosever it is, must not make a broker that works unusable.
        found = False
        while not found:
            read = await fetch(settings, consumer, timeout_ms=50)
            found = any(record.offset >= sent.offset for records in read.values() for record in records)
    finally:
        await consumer.stop()


async def _create_topic(settings: KafkaSettings) -> None:
    admin = AIOKafkaAdminClient(**connection_options(settings))
    try:
        await admin.start()
        topic = NewTopic(PROBE_TOPIC, 1, 1, topic_configs={"retention.ms": "3600000", "segment.bytes": "1048576"})
        await admin.create_topics([topic])
    finally:
        await admin.close()


@contextlib.contextmanager
def _quiet_clients() -> Generator[None]:
    """The client library's complaints about a broker that is still starting are expected here."""
    library = logging.getLogger("aiokafka")
    level = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(level)

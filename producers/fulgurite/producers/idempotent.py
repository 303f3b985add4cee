"""aiokafka's producer as we use it: idempotent, acks=all; connected however long it takes, given up when it must be.

Does not know records: see `fulgurite.producers.publisher`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, cast

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.credentials import connection_problem, ensure_accepted
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.partitions import partitioner
from fulgurite.schemas.settings import KafkaSettings, ProducerSettings

logger = logging.getLogger(__name__)

BATCH_BYTES = 1024 * 1024
"""Upper bound of a batch of small records; with it two cores send about 100k records/s."""

FRAMING_BYTES = 4_096
"""What Kafka's format adds to one record's key, value and headers, generously."""

REQUEST_TIMEOUT_MS = 30_000
"""After this a silent connection counts as broken. Kafka's own default."""

_ABANDON_SECONDS = 2.0


async def connect(kafka: KafkaSettings, settings: ProducerSettings, *, first: bool = False) -> AIOKafkaProducer:
    """A producer that has its producer id. Waits until a broker answers, for ever.

    The `first` time raises SettingsError when the brokers refuse us; later that may pass (see credentials.py).
    """
    backoff = Backoff(logger)
    if first and kafka.sasl_mechanism == "OAUTHBEARER":
        await ensure_accepted(kafka)  # a refused token is seen by nobody else
    while True:
        producer = AIOKafkaProducer(
            **connection_options(kafka),
            enable_idempotence=True,
            acks="all",
            partitioner=cast(Any, partitioner),  # aiokafka names its own class, and calls what it is given
            compression_type=None if settings.compression == "none" else settings.compression,
            linger_ms=settings.linger_ms,
            max_batch_size=min(BATCH_BYTES, kafka.max_record_bytes),
            max_request_size=kafka.max_record_bytes + FRAMING_BYTES,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            await producer.start()
        except (KafkaError, OSError) as error:
            await producer.stop()
            if first:
                await ensure_accepted(kafka)
            problem = await connection_problem(kafka)
            text = problem.text if problem else f"Kafka at {kafka.bootstrap_servers} is not ready: {error!r}"
            await backoff.wait(text)
        except BaseException:
            await abandon(producer)
            raise
        else:
            return producer


async def abandon(producer: AIOKafkaProducer) -> None:
    """Closes without delivering: AIOKafkaProducer.stop() would wait for the broker, for ever.

    aiokafka has no public way to do this, hence the private names: the connections are cut, which fails what is on the
    wire, and the sender is ended.
    """
    producer._closed = True  # pyright: ignore[reportPrivateUsage]
    sender = producer._sender.sender_task  # pyright: ignore[reportPrivateUsage]
    with contextlib.suppress(KafkaError, OSError):
        await asyncio.wait_for(producer.client.close(), _ABANDON_SECONDS)
    for _ in range(3):  # the first cancel makes the sender wait for its requests, the next cancels those
        if sender is None or sender.done():
            break
        sender.cancel()
        await asyncio.wait({sender}, timeout=_ABANDON_SECONDS / 3)
    if sender is not None and sender.done() and not sender.cancelled():
        sender.exception()

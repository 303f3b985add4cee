"""FastStream's part of the materialiser: connection, subscription and the fetch loop.

Promises: `take` gets every record as aiokafka made it, in the order of its partition; nothing is ever acknowledged
here. What of FastStream would hurt is kept away: its acknowledgements commit everything that was fetched (MANUAL, never
called); its decoder parses every message as JSON, its parser every header as text (both replaced); it begins at the
latest record (`earliest` here).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka import ConsumerRebalanceListener, ConsumerRecord
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.message import KafkaMessage
from faststream.kafka.subscriber.usecase import BatchSubscriber

from fulgurite.consumers.security import broker_options
from fulgurite.schemas.settings import Settings

logger = logging.getLogger(__name__)
logger.setLevel(logging.ERROR)  # FastStream says two lines a batch at INFO, and that topics are not created for it

POLL_MS = 50
"""How long the fetch loop waits when nothing came; it then sleeps as long. Batches are made by the writers."""

FETCH_BYTES = 8 * 1024 * 1024
"""Of one partition at a time; also the largest record, or it would never come."""

Records = Sequence[ConsumerRecord[bytes, bytes]]


def subscribe(
    settings: Settings,
    group: str,
    topics: list[str],
    listener: ConsumerRebalanceListener,
    take: Callable[[Records], None],
) -> tuple[KafkaBroker, BatchSubscriber]:
    """A broker to start and stop, and its subscriber, whose `consumer` exists from the start on."""
    broker = KafkaBroker(
        settings.kafka.bootstrap_servers,
        **broker_options(settings.kafka),
        consumer_only=True,
        allow_auto_create_topics=False,
        apply_types=False,
        logger=logger,
        client_id="fulgurite-materialiser",
    )
    session_ms = int(settings.materialiser.session_seconds * 1000)
    subscriber = broker.subscriber(
        *topics,
        group_id=group,
        batch=True,
        max_records=settings.materialiser.batch_records,
        batch_timeout_ms=POLL_MS,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=FETCH_BYTES,
        session_timeout_ms=session_ms,
        heartbeat_interval_ms=max(1, min(3_000, session_ms // 3)),
        listener=listener,
        parser=_parse,
        decoder=_decode,
        ack_policy=AckPolicy.MANUAL,
    )

    async def handle(records: Records) -> None:
        take(records)

    subscriber(handle)
    assert isinstance(subscriber, BatchSubscriber)
    return broker, subscriber


async def _parse(records: Any) -> KafkaMessage:
    return KafkaMessage(records, b"", message_id="batch", correlation_id="batch", consumer=_NeverUsed())


async def _decode(message: Any) -> Any:
    return message.raw_message


class _NeverUsed:
    """FastStream wants something to acknowledge with."""

    async def commit(self, offsets: Any = None) -> None:
        raise AssertionError("the materialiser commits by itself")

    def seek(self, partition: Any, offset: Any = None) -> None:
        raise AssertionError("the materialiser seeks by itself")

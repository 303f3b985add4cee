"""FastStream's part of the materialiser: connection and subscription.

Promises: a consumer that reads from the earliest record on, committed ones only, and commits nothing by itself. It has
no handler, so FastStream fetches nothing: its loop goes on after errors that lost records, it parses every message as
JSON, and its acknowledgements commit everything that was fetched. fetch.py does it.
"""

from __future__ import annotations

import logging

from aiokafka import ConsumerRebalanceListener, ConsumerRecord
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.subscriber.usecase import LogicSubscriber

from fulgurite.consumers.security import broker_options
from fulgurite.schemas.settings import Settings

logger = logging.getLogger(__name__)
logger.setLevel(logging.ERROR)  # FastStream says at INFO what it does, and that topics are not created for it

FETCH_BYTES = 8 * 1024 * 1024
"""Of one partition at a time; also the largest record, or it would never come."""


def subscribe(
    settings: Settings, group: str, topics: list[str], listener: ConsumerRebalanceListener
) -> tuple[KafkaBroker, LogicSubscriber[ConsumerRecord[bytes, bytes]]]:
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
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=FETCH_BYTES,
        session_timeout_ms=session_ms,
        heartbeat_interval_ms=max(1, min(3_000, session_ms // 3)),
        listener=listener,
        ack_policy=AckPolicy.MANUAL,
    )
    return broker, subscriber

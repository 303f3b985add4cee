"""FastStream's part of the materialiser: connection and subscription.

Promises: a consumer that reads from where it is sought, committed records only, and commits nothing by itself. It has
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

METADATA_SECONDS = 10
"""How old aiokafka's metadata may be: so long partitions that were added, or a topic that is there again, wait."""
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
        metadata_max_age_ms=METADATA_SECONDS * 1000,
    )
    session_ms = int(settings.materialiser.session_seconds * 1000)
    subscriber = broker.subscriber(
        *topics,
        group_id=group,
        # It would go elsewhere without a word, in a log that is another one than what the tables know.
        auto_offset_reset="none",
        isolation_level="read_committed",
        max_partition_fetch_bytes=FETCH_BYTES,
        session_timeout_ms=session_ms,
        heartbeat_interval_ms=max(1, min(3_000, session_ms // 3)),
        listener=listener,
        ack_policy=AckPolicy.MANUAL,
    )
    return broker, subscriber

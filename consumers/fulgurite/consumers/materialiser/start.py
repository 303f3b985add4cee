"""What the materialiser waits for before it begins: ClickHouse and its tables, the broker and its topics.

Promises: each of these returns when it is there, however long that takes, or False when the service is told to stop
first; it says what it waits for. Errors that no waiting helps against (a database of a newer version) are raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import clickhouse_connect
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from clickhouse_connect.driver.exceptions import ClickHouseError

from fulgurite.consumers.materialiser.errors import Unavailable
from fulgurite.consumers.materialiser.store import TABLES, Store
from fulgurite.consumers.redaction import apply_redaction
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.migrations import apply_migrations
from fulgurite.schemas.migrations import connection_options as clickhouse_options
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.storage import apply_storage

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0
"""Between tries while a store is not there yet."""


async def tables_ready(settings: Settings, stop: asyncio.Event) -> bool:
    """Applies the migrations, as soon as ClickHouse answers; False when `stop` came first."""
    while not stop.is_set():
        try:
            applied = await asyncio.to_thread(_bring_up_to_date, settings)
        except (ClickHouseError, OSError) as error:
            logger.warning("waiting for ClickHouse at %s: %s", settings.clickhouse.url, str(error)[:200])
            await _pause(stop)
        else:
            if applied:
                logger.info("applied %s to database %s", ", ".join(applied), settings.clickhouse.database)
            return True
    return False


def _bring_up_to_date(settings: Settings) -> list[str]:
    """Tables and views, what the views leave out of what they store, how long and how safely the tables keep it."""
    applied = apply_migrations(settings.clickhouse)
    options = clickhouse_options(settings.clickhouse)
    with clickhouse_connect.get_client(**options, database=settings.clickhouse.database) as client:
        apply_redaction(client, settings.redaction)
        apply_storage(client, settings.retention, settings.clickhouse.fsync)
    return applied


async def connected(store: Store, settings: Settings, stop: asyncio.Event) -> bool:
    """ClickHouse may be gone again since it had its tables; False when `stop` came first."""
    while not stop.is_set():
        try:
            await store.connect()
        except Unavailable as error:
            logger.warning("waiting for ClickHouse at %s: %s", settings.clickhouse.url, error)
            await _pause(stop)
        else:
            return True
    return False


async def topics_ready(settings: Settings, stop: asyncio.Event) -> bool:
    """Returns as soon as the broker has all topics; False when `stop` came first."""
    wanted = {settings.kafka.topic(topic) for topic in TABLES}
    while not stop.is_set():
        admin = AIOKafkaAdminClient(**connection_options(settings.kafka))
        try:
            await admin.start()
            missing = wanted - set(await admin.list_topics())
        except (KafkaError, OSError) as error:
            logger.warning("waiting for Kafka at %s: %r", settings.kafka.bootstrap_servers, error)
        else:
            if not missing:
                return True
            logger.warning("waiting for topics: %s (fulgurite topics create)", ", ".join(sorted(missing)))
        finally:
            await admin.close()
        await _pause(stop)
    return False


async def _pause(stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_SECONDS):
            await stop.wait()

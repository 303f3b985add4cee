"""The follower's process: the topic `resources` in, a convergence loop for every server, `training` out.

    read ─► versions ─┐
    own ─► lease ─────┴─► converge, one loop a server ─► report      own: owner.py, one follower of a resource acts

Reads the topic from its beginning at every start, without a consumer group: its truth is the newest record, not an
offset of its own, so there is nothing to commit and nothing to lose. It is compacted, so the beginning is near.

FastStream connects, with what its defaults would break set explicitly: `auto_offset_reset` (latest), topic creation
(on). It has no handler and so fetches nothing: its loop ends at a record that nobody can decode, its parser decodes
every header as UTF-8 and every value as JSON; an error there is logged and the record lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Final

import aiohttp
from aiokafka.errors import KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker

from fulgurite.consumers.follower.converge import Convergence
from fulgurite.consumers.follower.loading import Shared
from fulgurite.consumers.follower.owner import Lease, Owner
from fulgurite.consumers.follower.reports import Reports
from fulgurite.consumers.follower.server import PolicyServer
from fulgurite.consumers.security import broker_options
from fulgurite.producers.backoff import Backoff
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.reading import Fetched, fetch, value_of
from fulgurite.producers.service import serve_asgi
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import BufferFull, InvalidEvent, Undelivered
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings, KafkaSettings, Settings
from fulgurite.schemas.topics import RESOURCES

logger = logging.getLogger(__name__)

STAGE: Final = "follower"
SILENCE_SECONDS: Final = 0.3
"""The log counts as read when nothing more came for this long: a start loads the newest version, not all of them."""
FIRST_READ_SECONDS: Final = 5.0
"""Longest that servers wait for the log at the start: one that was left paused waits for its next version no longer."""
STOP_SECONDS: Final = 4.0
"""Longest that a stop waits for servers to be resumed."""
POLL_MS: Final = 500


class Follower:
    """What the records of `resources` become."""

    def __init__(self, settings: Settings, publisher: Publisher, shared: Shared) -> None:
        self._settings = settings
        self._publisher = publisher
        self.versions = shared.versions

    async def on_record(self, record: Fetched) -> None:
        """One record of the topic. Never raises for what is in it."""
        try:
            value = value_of(record)
            if value is None:
                return  # a tombstone: compaction's way to forget a resource; servers keep what they serve
            version = decode(ResourceVersion, value)
            if version.resource == self._settings.follower.resource:
                self.versions.add(version)
        except InvalidEvent as error:
            await self._reject(record, error)

    async def _reject(self, record: Fetched, error: InvalidEvent) -> None:
        """A dead letter; again at every start while the log has the record, with the same partition and offset."""
        dead = DeadLetter(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stage=STAGE,
            reason=error.reason,
            message=str(error),
            key=record.key,
            value=record.value,
        )
        logger.error("%s offset %d is no version to serve: %s", record.topic, record.offset, error)
        backoff = Backoff(logger)
        while True:
            try:
                await (await self._publisher.publish_dead_letter(dead))
            except (BufferFull, Undelivered) as problem:
                await backoff.wait(f"cannot publish a dead letter: {problem}")
            else:
                return


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Follows until `stop`; then resumes what it has paused."""
    shared = Shared(settings.follower, lease=Lease())
    over = asyncio.Event()
    metrics = asyncio.create_task(_serve_metrics(settings.follower, shared, over))
    serving = asyncio.create_task(_serve(settings, shared))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping, metrics}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if serving.done():
            serving.result()  # it never returns by itself: this raises what ended it
        else:
            await _end(serving)
    finally:
        over.set()
        await metrics  # raises what ended it first: its port is taken


async def _end(serving: asyncio.Task[None]) -> None:
    serving.cancel()
    done, _ = await asyncio.wait({serving}, timeout=STOP_SECONDS)
    for task in done:
        if not task.cancelled():
            task.result()
    if not done:
        logger.error("a server did not answer within %g s; it may be paused until the next start", STOP_SECONDS)


async def _serve_metrics(settings: FollowerSettings, shared: Shared, over: asyncio.Event) -> None:
    if settings.port:
        await serve_asgi(shared.metrics.app(), settings.host, settings.port, over, "follower")
    else:
        await over.wait()


async def _serve(settings: Settings, shared: Shared) -> None:
    publisher = Publisher(settings.kafka, settings.producer)
    follower = Follower(settings, publisher, shared)
    timeout = aiohttp.ClientTimeout(total=None)  # PolicyServer bounds every call itself
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publisher.start())
            reports = Reports(publisher)
            tasks.create_task(_publish(reports, publishing), name="report")
            settled = asyncio.Event()
            tasks.create_task(_read(settings, follower, publishing, settled), name="read")

            def act() -> Coroutine[None, None, None]:
                return _converge(settings.follower, shared, session, reports, settled)

            owner = Owner(settings.kafka, settings.follower, shared.lease, act)
            tasks.create_task(owner.run(), name="own")
    finally:
        await shared.files.close()
        await publisher.close()


async def _converge(
    settings: FollowerSettings, shared: Shared, session: aiohttp.ClientSession, reports: Reports, settled: asyncio.Event
) -> None:
    """The loops of all servers, until cancelled; then what has begun goes to its end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(settled.wait(), FIRST_READ_SECONDS)
    api_key = settings.api_key.get_secret_value()
    shared.metrics.acts(True)
    try:
        async with asyncio.TaskGroup() as tasks:
            for url in settings.servers:
                server = PolicyServer(url, session, settings.request_seconds, api_key)
                loop = Convergence(server, shared, reports.add)
                tasks.create_task(loop.run(), name=f"converge {url}")
            logger.info("ready; %s on %s", settings.resource, ", ".join(settings.servers))
    finally:
        shared.metrics.acts(False)


async def _publish(reports: Reports, publishing: asyncio.Task[None]) -> None:
    await asyncio.shield(publishing)
    await reports.run()


async def _read(settings: Settings, follower: Follower, publishing: asyncio.Task[None], settled: asyncio.Event) -> None:
    """Reads the topic until cancelled; sets `settled` when it was read to its end once."""
    await asyncio.shield(publishing)  # what cannot be used must have somewhere to go
    backoff = Backoff(logger)
    problem = ""
    while True:
        try:
            await read_versions(settings.kafka, follower, settled)
        except (KafkaError, OSError) as error:
            problem = f"cannot read {settings.kafka.topic(RESOURCES)}: {error!r}"
        await backoff.wait(problem)


async def read_versions(settings: KafkaSettings, follower: Follower, settled: asyncio.Event) -> None:
    """By one connection, until it or this ends. Raises KafkaError or OSError."""

    async def settle() -> None:
        await follower.versions.settled(SILENCE_SECONDS)
        settled.set()

    broker = KafkaBroker(
        settings.bootstrap_servers,
        **broker_options(settings),
        consumer_only=True,
        allow_auto_create_topics=False,
        apply_types=False,
        logger=logging.getLogger("faststream"),
        log_level=logging.DEBUG,
        graceful_timeout=1.0,
    )
    subscriber = broker.subscriber(
        settings.topic(RESOURCES),
        group_id=None,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        ack_policy=AckPolicy.MANUAL,
        max_partition_fetch_bytes=settings.max_record_bytes,
    )
    settling: asyncio.Task[None] | None = None
    try:
        await broker.start()
        consumer = subscriber.consumer
        assert consumer is not None, "FastStream makes it when it starts"
        settling = asyncio.create_task(settle())
        while True:
            for records in (await fetch(settings, consumer, timeout_ms=POLL_MS)).values():
                for record in records:
                    await follower.on_record(record)
    finally:
        if settling is not None:
            settling.cancel()
        await broker.stop()

"""Which follower acts on a resource's servers: the one to which a consumer group gives the partition of `resources`.

    join ─► assigned ─► 1 prove: the lease runs ─► 2 act ─► revoked ─► 3 stop, to its end ─► 4 give it up
                          └──── every second ────┘

1. Commit an offset as this member of this generation: the broker refuses it to everybody but the owner, and gives the
   partition to nobody else within session_seconds of it. So long the lease runs, from before the commit was asked for.
2. Act while the lease runs. When it runs out (Kafka is away) nothing is begun any more; when the next proof succeeds,
   nobody else was the owner in between, and the loops go on.
3. Revoked: nothing is begun; what has begun goes to its end, as when the process stops.
4. Only then the group goes on without us, unless that took longer than `_rebalance_seconds`.

Promises: two followers of one group never begin to change a server at the same time. What had begun when the lease ran
out may still run when another follower begins: the label says whose load it is, and who finds another's gives no label
and resumes nothing (weights.py). The offset means nothing; nothing is read here. Knows nothing of versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Final
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import TopicPartition

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.addresses import is_loopback
from fulgurite.schemas.settings import FollowerSettings, KafkaSettings
from fulgurite.schemas.topics import RESOURCES

logger = logging.getLogger(__name__)

PROVE_SECONDS: Final = 1.0
"""Between two proofs: several fit into a session, so one slow commit stops nothing."""
JOIN_POLL_SECONDS: Final = 0.1
LEAVE_SECONDS: Final = 2.0
"""A broker that does not answer hears of our end by our silence."""


def group_of(kafka: KafkaSettings, settings: FollowerSettings) -> str:
    """The consumer group of the followers of which one may act. Those of other servers are none of them."""
    if settings.group:
        return f"{kafka.topic_prefix}{settings.group}.{settings.resource}"
    servers = sorted(settings.servers)
    if any(is_loopback(urlsplit(url).hostname or "") for url in servers):
        servers.append(socket.gethostname())
    digest = hashlib.sha256("\n".join(servers).encode()).hexdigest()[:12]
    return f"{kafka.topic_prefix}follower.{settings.resource}.{digest}"


class Lease:
    """Until when this process may begin to change a server. `math.inf`: for ever, where nobody else is there."""

    def __init__(self, until: float = -math.inf) -> None:
        self._until = until
        self._renewed = asyncio.Event()

    @property
    def is_held(self) -> bool:
        return time.monotonic() < self._until

    def renew(self, until: float) -> None:
        self._until = until
        self._renewed.set()

    def end(self) -> None:
        self._until = -math.inf

    async def held(self) -> None:
        """Returns when it runs."""
        while not self.is_held:
            self._renewed.clear()
            await self._renewed.wait()


class Owner(ConsumerRebalanceListener):
    """Runs `act` while this process owns the resource; `act` never returns by itself."""

    def __init__(
        self,
        kafka: KafkaSettings,
        settings: FollowerSettings,
        lease: Lease,
        act: Callable[[], Coroutine[None, None, None]],
    ) -> None:
        self._kafka = kafka
        self._settings = settings
        self._lease = lease
        self._act = act
        self._acting: asyncio.Task[None] | None = None
        self._consumer: AIOKafkaConsumer | None = None

    async def run(self) -> None:
        """Until cancelled. Raises what `act` raises."""
        backoff = Backoff(logger)
        topic = self._kafka.topic(RESOURCES)
        while True:
            self._consumer = consumer = self._new_consumer()
            problem = ""
            try:
                await consumer.start()
                consumer.subscribe([topic], listener=self)
                await self._keep(consumer)
            except (KafkaError, OSError) as error:
                problem = f"cannot join the followers of {self._settings.resource}: {error!r}"
            finally:
                await self._stop()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEAVE_SECONDS):
                        await consumer.stop()
            await backoff.wait(problem)

    def _new_consumer(self) -> AIOKafkaConsumer:
        session_ms = int(self._settings.session_seconds * 1000)
        return AIOKafkaConsumer(
            **connection_options(self._kafka),
            group_id=group_of(self._kafka, self._settings),
            client_id="fulgurite-follower",
            enable_auto_commit=False,
            auto_offset_reset="latest",
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=max(1, min(3_000, session_ms // 3)),
            rebalance_timeout_ms=int(self._rebalance_seconds * 1000),
        )

    @property
    def _rebalance_seconds(self) -> float:
        """Longest that the next owner waits for this one: a load, its check, and the load of the version before."""
        return max(60.0, 5 * self._settings.request_seconds)

    async def _keep(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            poll = PROVE_SECONDS if self._lease.is_held or not consumer.assignment() else JOIN_POLL_SECONDS
            await consumer.getmany(timeout_ms=int(poll * 1000))  # gives nothing: the partition is paused
            if self._acting and self._acting.done():
                self._acting.result()
            if consumer.assignment():
                await self._prove(consumer)

    async def _prove(self, consumer: AIOKafkaConsumer) -> None:
        """Step 1."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.session_seconds):
                await consumer.commit(dict.fromkeys(consumer.assignment(), 0))
        except (CommitFailedError, IllegalStateError) as error:
            self._lease.end()
            logger.info("the group of followers is rebalanced: %s", error)
        except (KafkaError, TimeoutError) as error:
            logger.warning("cannot prove to be the only follower of %s: %r", self._settings.resource, error)
        else:
            if self._acting:
                self._lease.renew(asked_at + self._settings.session_seconds)

    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride]  (aiokafka awaits it)
        self, assigned: Iterable[TopicPartition]
    ) -> None:
        mine = set(assigned)
        if not mine:
            logger.info("another follower acts on the servers of %s; waiting", self._settings.resource)
            return
        assert self._consumer
        self._consumer.pause(*mine)
        if self._acting is None:
            logger.info("this follower acts on the servers of %s", self._settings.resource)
            self._acting = asyncio.create_task(self._act())  # 2

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]  (aiokafka awaits it)
        self, revoked: Iterable[TopicPartition]
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        """Step 3."""
        self._lease.end()
        acting, self._acting = self._acting, None
        if acting is None:
            return
        acting.cancel()
        await asyncio.wait({acting})
        if not acting.cancelled() and (error := acting.exception()):
            raise error

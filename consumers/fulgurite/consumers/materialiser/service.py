"""Wires the materialiser: a consumer and its fetching in front, a buffer for every assigned partition, a writer for
every topic, log and commits behind.

The flow and the contract are in the package's docstring; steps 2 and 3 are here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Coroutine, Sequence

from aiokafka import ConsumerRebalanceListener, TopicPartition

from fulgurite.consumers.materialiser.blocks import Partition
from fulgurite.consumers.materialiser.errors import Unavailable
from fulgurite.consumers.materialiser.fences import WENT_BACK
from fulgurite.consumers.materialiser.fetch import Fetching
from fulgurite.consumers.materialiser.history import History
from fulgurite.consumers.materialiser.lag import LagMeter
from fulgurite.consumers.materialiser.metrics import Metrics
from fulgurite.consumers.materialiser.offsets import Offsets
from fulgurite.consumers.materialiser.partition import Budget, PartitionBuffer
from fulgurite.consumers.materialiser.skipped import Skipped
from fulgurite.consumers.materialiser.start import connected, tables_ready, topics_ready
from fulgurite.consumers.materialiser.store import TABLES, LogEntry, Store
from fulgurite.consumers.materialiser.stream import subscribe
from fulgurite.consumers.materialiser.topic import Checkpoint, Shared, TopicWriter, no_checkpoint
from fulgurite.consumers.materialiser.watch import Watch
from fulgurite.producers.raw import read
from fulgurite.producers.service import run_service, serve_asgi, spare_the_collector
from fulgurite.schemas.settings import MaterialiserSettings, Settings
from fulgurite.schemas.topics import REWARDS, SPANS, Topic

logger = logging.getLogger(__name__)

BUFFER_BYTES = 256 * 1024 * 1024
"""Over all partitions: records fetched and not yet inserted. An insert needs its bytes twice more, as Arrow."""
CONCURRENT_INSERTS = 2
"""Over all topics: while one is sent the other is parsed. More would compete for ClickHouse's memory and cores."""
FLUSH_SECONDS = 1.0
"""How often steps 2 and 3 are done for what was inserted since."""
CHECK_SECONDS = 15.0
"""How often finished ranges are looked for in the tables."""
STOP_SECONDS = 3.0
"""Longest that the last flush may take when the service ends."""


def main(settings: Settings) -> int:
    """`fulgurite materialiser`."""
    spare_the_collector()
    seconds = settings.materialiser.stop_seconds
    return run_service("materialiser", settings.log, lambda stop: serve(settings, stop), seconds)


async def serve(settings: Settings, stop: asyncio.Event, checkpoint: Checkpoint = no_checkpoint) -> None:
    """Runs until `stop`. Waits for both stores, brings the tables up to date. `checkpoint` is for tests that crash
    it."""
    metrics = Metrics()
    await _with_metrics(metrics, settings.materialiser, stop, _serve(settings, metrics, stop, checkpoint))


async def _serve(settings: Settings, metrics: Metrics, stop: asyncio.Event, checkpoint: Checkpoint) -> None:
    if not await tables_ready(settings, stop):
        return
    name = f"{socket.gethostname()}-{os.getpid()}"
    store = Store(settings.clickhouse, settings.materialiser.insert_seconds, name, settings.redaction)
    try:
        if await topics_ready(settings, stop) and await connected(store, settings, stop):
            await Materialiser(settings, store, metrics, checkpoint).run(stop)
    finally:
        await store.close()


async def _with_metrics(
    metrics: Metrics, settings: MaterialiserSettings, stop: asyncio.Event, service: Coroutine[None, None, None]
) -> None:
    """Who asks gets an answer from the first moment on, also while the stores are waited for."""
    if not settings.port:
        await service
        return
    over = asyncio.Event()
    app = metrics.app(settings.ready_lag_seconds)
    serving = asyncio.create_task(serve_asgi(app, settings.host, settings.port, over, "materialiser"))
    running = asyncio.create_task(service)
    try:
        await asyncio.wait({serving, running}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():  # only an error ends it first
            stop.set()
        await running
    finally:
        over.set()
        await serving


class Materialiser(ConsumerRebalanceListener):
    """The running service: it is told which partitions are its own, and gives each topic of theirs a writer."""

    def __init__(
        self, settings: Settings, store: Store, metrics: Metrics, checkpoint: Checkpoint = no_checkpoint
    ) -> None:
        self._settings = settings
        self._store = store
        self._checkpoint = checkpoint
        self._topics = {settings.kafka.topic(topic): topic for topic in TABLES}
        self._group = f"{settings.kafka.topic_prefix}{settings.materialiser.group}"
        self._buffers: dict[TopicPartition, PartitionBuffer] = {}
        self._writers: dict[str, TopicWriter] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._inserts = asyncio.Semaphore(CONCURRENT_INSERTS)
        self._budget = Budget(BUFFER_BYTES)
        self.metrics = metrics
        self._topic_ids: dict[TopicPartition, str] = {}
        self._to_check: dict[TopicPartition, LogEntry] = {}
        self._check_at = 0.0
        self._finished: list[LogEntry] = []
        self._flushing = asyncio.Lock()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._broker, self._subscriber = subscribe(settings, self._group, list(self._topics), self)
        self._history = History(settings.kafka)
        self._skipped = Skipped(self._history.read, store.newest)
        self._watch_logs = Watch(list(self._topics), self._buffers, self._history, self._doubt, metrics)
        self._fetching = Fetching(
            self._buffers,
            wake=self._wake,
            read=lambda tp, offset: read(settings.kafka, tp, offset),
            doubt=self._doubt,
            batch_records=settings.materialiser.batch_records,
            metrics=self.metrics,
        )
        self._offsets: Offsets | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, or until a writer raises what no retry helps against."""
        tasks = [asyncio.create_task(self._behind())]
        try:
            await self._broker.start()
            logger.info("ready: %d topics into database %s", len(self._topics), self._settings.clickhouse.database)
            consumer = self._subscriber.consumer
            assert consumer is not None
            tasks.append(asyncio.create_task(self._fetching.run(consumer)))
            tasks.append(asyncio.create_task(LagMeter(self._buffers, self.metrics).run(consumer)))
            tasks.append(asyncio.create_task(self._watch_logs.run(consumer)))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({stopping, self._failed, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            for ended in (self._failed, *tasks):
                if ended.done():
                    ended.result()
        finally:
            stop.set()  # so that an end by an error has a deadline, too
            await self._end_writers()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._flush_within(STOP_SECONDS)
            await self._history.close()
            await self._broker.stop()

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]  (aiokafka awaits it)
        self, revoked: set[TopicPartition]
    ) -> None:
        """Before they go to somebody else: what runs is ended, what is done is said. They are all of ours."""
        self.metrics.left()
        await self._end_writers()
        await self._flush_within(self._settings.materialiser.session_seconds / 2)
        self._skipped.forget()

    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride]  (aiokafka awaits it)
        self, assigned: set[TopicPartition]
    ) -> None:
        consumer = self._subscriber.consumer  # FastStream makes it when it starts, before anything is assigned
        assert consumer is not None
        self._offsets = self._offsets or Offsets(consumer)
        # Nothing is fetched until it is known where to begin.
        consumer.pause(*assigned)
        for tp in assigned:
            consumer.seek(tp, 0)  # else aiokafka asks for what was committed, and raises where nothing was
        shared = Shared(
            settings=self._settings.materialiser,
            consumer=consumer,
            store=self._store,
            offsets=self._offsets,
            inserts=self._inserts,
            history=self._history,
            topic_ids=self._topic_ids,
            finished=self._finished.append,
            checkpoint=self._checkpoint,
            metrics=self.metrics,
        )
        batch_records = self._settings.materialiser.batch_records
        for tp in assigned:
            partition = Partition(self._topics[tp.topic], tp.topic, tp.partition)
            share_bytes = BUFFER_BYTES // len(assigned)
            self._buffers[tp] = PartitionBuffer(partition, consumer, self._budget, batch_records, share_bytes)
        for name in {tp.topic for tp in assigned}:
            buffers = [buffer for tp, buffer in sorted(self._buffers.items()) if tp.topic == name]
            self._writers[name] = TopicWriter(name, buffers, shared)
            task = asyncio.create_task(self._writers[name].run(), name=name)
            task.add_done_callback(self._watch)
            self._tasks.append(task)
        self.metrics.joined()

    def _wake(self, topic: str) -> None:
        if (writer := self._writers.get(topic)) is not None:
            writer.wake()

    def _doubt(self, tp: TopicPartition, why: str) -> None:
        if (writer := self._writers.get(tp.topic)) is not None:
            self._skipped.forget(tp)
            writer.doubt(tp, why)

    async def _end_writers(self) -> None:
        tasks, self._tasks = self._tasks, []
        self._writers.clear()
        self._buffers.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _watch(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _behind(self) -> None:
        """What is done for all partitions at once, every second: steps 2 and 3, and looking for what was inserted."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self._flush()
            await self._reconcile()

    async def _reconcile(self) -> None:
        """Now and then looks for what was inserted since, offset by offset, and counts dead letters for /metrics."""
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + CHECK_SECONDS
        ranges, self._to_check = self._to_check, {}
        try:
            await self._look_for_marks()
            for tp, entry in ranges.items():
                if tp not in self._buffers:
                    continue  # whoever has it now looks, and asks what is left to be asked
                if not self._skipped.asked(tp):
                    self._to_check.setdefault(tp, entry)
                    continue
                missing = await self._store.missing(entry.partition, entry.lo, entry.hi)
                self.metrics.reconciled(tp.topic, tp.partition, entry.hi - entry.lo + 1, missing)
                if missing and self._kept_for_ever(entry.partition.topic):
                    where = {"topic": tp.topic, "partition": tp.partition, "offset": entry.lo}
                    what = "%s: %d offsets of %d..%d are nowhere"
                    logger.error(what, entry.partition, missing, entry.lo, entry.hi, extra=where)
            if self._settings.materialiser.port:  # else nobody can ask, and counting reads the whole table
                self.metrics.dead_letters(await self._store.dead_letters())
        except Unavailable as error:
            logger.debug("reconciliation left out: %s", error)

    async def _look_for_marks(self) -> None:
        """Of partitions that nobody writes to: whether the database is still the one that they were logged in."""
        for name, writer in list(self._writers.items()):
            ours = [buffer for buffer in self._buffers.values() if buffer.partition.name == name and buffer.settled]
            marks = {buffer.partition: buffer.mark for buffer in ours if buffer.mark is not None}
            for partition in await self._store.lacking(marks) if marks else []:
                buffer = self._buffers.get(TopicPartition(name, partition.number))
                if buffer is not None and buffer.mark == marks[partition]:
                    logger.error("%s: %s", partition, WENT_BACK, extra={"topic": name, "partition": partition.number})
                    writer.unsettle(partition)

    def _kept_for_ever(self, topic: Topic) -> bool:
        """Whether an offset that is nowhere is an alarm: nothing expires."""
        days = {SPANS: self._settings.retention.spans_days, REWARDS: self._settings.retention.rewards_days}
        return days.get(topic, 1) == 0

    async def _flush_within(self, seconds: float) -> None:
        """Steps 2 and 3 are only hints for the next owner: not worth missing the rebalance or the end of a service."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._flush()

    async def _flush(self) -> None:
        async with self._flushing:
            entries, later = self._finished.copy(), list[LogEntry]()
            try:
                settled = [buffer.partition for buffer in self._buffers.values() if buffer.settled]
                entries, later = await self._skipped.known(entries, settled)
                # 2
                if entries:
                    await self._store.log(entries)
                for name in {entry.partition.name for entry in later}:
                    await self._store.log_again([entry for entry in later if entry.partition.name == name])
            except asyncio.CancelledError:
                self._skipped.forget()  # what was asked, and is perhaps not logged, is asked again
                raise
            except Unavailable as error:
                for entry in (*entries, *later):
                    self._skipped.forget(TopicPartition(entry.partition.name, entry.partition.number))
                if not entries:
                    logger.debug("gaps are asked later: %s", error)
                    return
                # What comes back need not be the database that had it: what is there, and not logged, is asked.
                logger.warning("cannot log what was inserted, asking the tables again: %s", error)
                del self._finished[: len(entries)]
                for entry in entries:
                    if (writer := self._writers.get(entry.partition.name)) is not None:
                        writer.unsettle(entry.partition)
                return
            del self._finished[: len(entries)]
            for entry in entries:
                buffer = self._buffers.get(TopicPartition(entry.partition.name, entry.partition.number))
                if buffer is not None:
                    buffer.mark = entry.lo
            for entry in (*entries, *later):
                if entry.skipped:
                    count = sum(hi - lo + 1 for lo, hi in entry.skipped)
                    self.metrics.skipped(entry.partition.name, entry.partition.number, count)
            for entry in entries:
                # One range of each partition is checked: a sample under load, everything when there is little.
                self._to_check[TopicPartition(entry.partition.name, entry.partition.number)] = entry
            await self._at_checkpoint("logged", entries)
            if entries and self._offsets is not None:
                # 3
                done = {TopicPartition(e.partition.name, e.partition.number): e.hi + 1 for e in entries}
                await self._offsets.finish(done)
            await self._at_checkpoint("committed", entries)

    async def _at_checkpoint(self, step: str, entries: Sequence[LogEntry]) -> None:
        for entry in entries:
            await self._checkpoint(step, entry.partition)

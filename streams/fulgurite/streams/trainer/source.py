"""The run whose rollouts another run trains on: what it was started with, and its ledger, record by record.

A replay trusts the source's ledger (`training`) for one thing: when a group was over. A step's record names every
rollout that the source settled with it, and the offsets of `trajectories` it had read by then; so whoever reads the
ledger in order and `trajectories` up to those offsets comes to the same groups in the same order, whenever and however
often, without a clock. Reads with read_committed: a step is seen when it counts.

Does not know windows or learners.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError
from pydantic import ValidationError

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch, log_ends
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.errors import InvalidEvent, SettingsError, StartError
from fulgurite.schemas.settings import KafkaSettings, Settings, SourceSettings, TrainerSettings
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import TRAINING_EVENT, RolloutsDecided, RunFinished, RunStarted, TrainingStep
from fulgurite.streams.trainer.ledger import LedgerEvent, whole
from fulgurite.streams.trainer.log import partitions_of, records_since
from fulgurite.streams.trainer.plan import OF_ASKING, at_fault, check_together

logger = logging.getLogger(__name__)

OWN = ("run_id", "resource", "output", "tasks", "window_seconds", "metrics_host", "metrics_port")
"""Settings of the trainer that a replay never takes from its source."""

FETCH_RECORDS = 64
"""Ledger records of one poll; a step's names all rollouts of its window."""


async def adopt(settings: Settings) -> Settings:
    """Settings of `trainer` and `source` that were not set become those that the source run began with, but for those
    that do not go together with what is set here, which are named in the log. A setting of how rollouts are asked for
    that is the source's own, in the file of both perhaps, counts as not set: nothing here reads it.

    Raises SettingsError where there is no such run, or where it is itself a replay: then its source is the one to name;
    and where its groups are of another size than is set here.
    """
    source = settings.source
    if not source.run_id:
        return settings
    started = await _started(settings.kafka, source.run_id)
    config: dict[str, Any] = dict(started.config)
    theirs: Any = config.pop("source", {})
    if isinstance(theirs, Mapping) and theirs.get("run_id"):
        raise SettingsError(
            f"source.run_id = {source.run_id}: that run trains on the rollouts of {theirs['run_id']} itself; name that"
        )
    defaults: dict[str, Any] = TrainerSettings().model_dump(mode="json")
    here = settings.trainer.model_dump(mode="json")
    alike = {name for name in OF_ASKING if here[name] == config.get(name, defaults[name])}
    ours = settings.trainer.model_dump(include=settings.trainer.model_fields_set - alike)
    # What is as by default counts as not set: some settings are refused where they would have no effect.
    taken = {
        name: value
        for name, value in config.items()
        if name in defaults and name not in OWN and name not in ours and value != defaults[name]
    }
    size = config.get("group_size", defaults["group_size"])
    if source.begin != "sql" and ours.get("group_size", size) != size:
        raise SettingsError(
            f"trainer.group_size = {ours['group_size']}, but the source run {source.run_id} asked for groups of "
            f"{size}, and they are what is trained on; leave it out"
        )
    trainer = fitting(source.run_id, taken, ours)
    if trainer.resource == started.resource:
        raise SettingsError(
            f"trainer.resource = {trainer.resource} is what the source run {source.run_id} makes versions of: set "
            "another one, which no server follows"
        )
    resource = source.resource or started.resource
    return settings.model_copy(update={"trainer": trainer, "source": source.model_copy(update={"resource": resource})})


def fitting(run_id: str, taken: dict[str, Any], ours: dict[str, Any]) -> TrainerSettings:
    """Ours, and of the source's what can go with it: a dr_grpo's length_constant, say, would be refused with gspo."""
    while True:
        try:
            trainer = TrainerSettings.model_validate(taken | ours)
        except ValidationError as error:
            raise SettingsError(
                f"source.run_id = {run_id}: its settings, with those set here, are no valid ones: {error}"
            ) from None
        # As set count those that were set here: what is the source's may have no effect with them, which is no fault.
        values = {name: getattr(trainer, name) for name in TrainerSettings.model_fields}
        trainer = TrainerSettings.model_construct(set(ours), **values)
        try:
            check_together(trainer)
        except SettingsError as error:
            name = at_fault(error)
            if name not in taken or name == "loss":  # another objective is no detail
                return trainer  # the plan says what is wrong
            logger.warning("trainer.%s = %s of the source run %s is left out: %s", name, taken.pop(name), run_id, error)
        else:
            return trainer


async def _started(kafka: KafkaSettings, run_id: str) -> RunStarted:
    """The first word of a run. Of several (it was restarted) the first one, so that a restart here finds the same."""
    backoff = Backoff(logger)
    topic = kafka.topic(TRAINING)
    while True:
        try:
            values, _ = await records_since(kafka, topic, run_id.encode(), {}, wait_for_open=True)
            break
        except (KafkaError, TimeoutError) as error:
            await backoff.wait(f"reading {topic}: {error!r}")
    for value in values:
        event = _event(value)
        if isinstance(event, RunStarted):
            return event
    raise SettingsError(
        f'source.run_id = {run_id!r}: {topic} knows no such run; `fulgurite sql "SELECT DISTINCT run_id FROM '
        'run_events"` lists them'
    )


class SourceLedger:
    """Steps and the end of one run, in the log's order. `offsets` lie behind what `next` gave."""

    def __init__(self, settings: KafkaSettings, source: SourceSettings) -> None:
        self._settings = settings
        self._run_id = source.run_id
        self._topic = settings.topic(TRAINING)
        self._consumer: AIOKafkaConsumer | None = None
        self._fetched: deque[tuple[int, int, LedgerEvent | None]] = deque()
        self._parts: list[RolloutsDecided] = []
        """Of the next event."""
        self.offsets: dict[int, int] = {}

    async def start(self, offsets: Mapping[int, int]) -> None:
        """From these offsets, a partition without one from its beginning. Waits for Kafka."""
        backoff = Backoff(logger)
        while True:
            consumer = AIOKafkaConsumer(
                **connection_options(self._settings),
                isolation_level="read_committed",
                enable_auto_commit=False,
                auto_offset_reset="none",
            )
            try:
                await consumer.start()
                partitions = await partitions_of(self._settings, self._topic)
                first = await consumer.beginning_offsets(partitions)
                consumer.assign(partitions)  # and seek at once, see TrajectoryReader.seek
                for tp in partitions:
                    at = offsets.get(tp.partition, first[tp])
                    consumer.seek(tp, at)
                    self.offsets[tp.partition] = at
                self._consumer = consumer
                return
            except (KafkaError, TimeoutError) as error:
                await consumer.stop()
                await backoff.wait(f"reading {self._topic}: {error!r}")

    async def next(self, timeout_seconds: float) -> LedgerEvent | None:
        """The next step, or the end of the run; None where nothing has come within the time."""
        if not self._fetched:
            await self._fetch(timeout_seconds)
        while self._fetched:
            partition, offset, event = self._fetched.popleft()
            if isinstance(event, RolloutsDecided) and event.part_of:
                self._parts.append(event)
                continue
            if self._parts and event is None:
                continue  # whoever goes on from `offsets` reads the parts again
            self.offsets[partition] = offset + 1
            if event is not None:
                parts, self._parts = self._parts, []
                return whole(event, parts)
        return None

    async def at_end(self) -> bool:
        """Whether everything that is committed was given out, and no transaction is open that may hold more."""
        assert self._consumer is not None, "start() comes first"
        if self._fetched:
            return False
        partitions = [TopicPartition(self._topic, number) for number in self.offsets]
        try:
            # The ends of the log itself cost a connection.
            return await self._is_at(await self._consumer.end_offsets(partitions)) and await self._is_at(
                await log_ends(self._settings, partitions)
            )
        except (KafkaError, TimeoutError) as error:
            logger.warning("asking for the end of %s: %r; trying again", self._topic, error)
            return False

    async def _is_at(self, ends: Mapping[TopicPartition, int]) -> bool:
        assert self._consumer is not None, "start() comes first"
        return all([await self._consumer.position(tp) >= end for tp, end in ends.items()])

    async def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await consumer.stop()

    async def _fetch(self, timeout_seconds: float) -> None:
        assert self._consumer is not None, "start() comes first"
        try:
            found = await fetch(
                self._settings, self._consumer, timeout_ms=int(timeout_seconds * 1000), max_records=FETCH_RECORDS
            )
        except OffsetOutOfRangeError as error:
            raise StartError(
                f"{self._topic} no longer holds what this replay has to read next ({error}): its retention is over"
            ) from error
        key = self._run_id.encode()
        for records in found.values():
            for record in records:
                is_event = record.key == key and not isinstance(record, Undecodable)
                event = _event(record.value) if is_event else None
                wanted = event if isinstance(event, TrainingStep | RolloutsDecided | RunFinished) else None
                self._fetched.append((record.partition, record.offset, wanted))


def _event(value: bytes | None) -> object:
    try:
        return decode_union(TRAINING_EVENT, "TrainingEvent", value)
    except InvalidEvent:
        return None  # the materialiser keeps it as a dead letter

"""What the log says about a run: the only judge of which version is committed.

Promises: `committed_run` reads with read_committed up to the end as it was when asked, after the caller has fenced any
predecessor; so what it gives is final. The end is that of the log: others' transactions that are still open hide what
was committed behind their records, and are waited for. It waits for Kafka for as long as it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch_up_to, log_ends
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import (
    TRAINING_EVENT,
    DroppedRollout,
    RolloutsDecided,
    RunFinished,
    RunStarted,
    TrainingStep,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CommittedRun:
    """Where a run stands according to the log."""

    resource: str
    version: int
    step: int
    finished: bool
    named: list[DroppedRollout] = field(default_factory=list[DroppedRollout])
    """Dropped since that version, and named by a record between versions."""
    lineages: frozenset[str] | None = None
    """Of its starts; more than one where Kafka forgot its offsets. None where a start does not say: of before."""


async def committed_run(settings: KafkaSettings, run_id: str) -> CommittedRun | None:
    """None for a run that never began."""
    backoff = Backoff(logger)
    while True:
        try:
            return await _scan(settings, run_id)
        except (KafkaError, TimeoutError) as error:
            await backoff.wait(f"reading {settings.topic(TRAINING)}: {error!r}")


async def _scan(settings: KafkaSettings, run_id: str) -> CommittedRun | None:
    found: CommittedRun | None = None
    lineages: set[str] = set()
    values, _ = await records_since(settings, settings.topic(TRAINING), run_id.encode(), {}, wait_for_open=True)
    for value in values:
        try:
            event = decode_union(TRAINING_EVENT, "TrainingEvent", value)
        except InvalidEvent:
            continue  # the materialiser keeps it as a dead letter
        if isinstance(event, RunStarted):
            lineages.add(event.lineage)
        match event:
            case RunStarted(resource=resource, version=version, step=step) if found is None:
                found = CommittedRun(resource, version, step, False)
            case TrainingStep(resource=resource, version_out=version, step=step):
                found = CommittedRun(resource, version, step, False)
            case RolloutsDecided(dropped=dropped) if found is not None:
                found.named.extend(dropped)  # those of a step's parts are gone with the step behind them
            case RunFinished(resource=resource, version=version, step=step):
                found = CommittedRun(resource, version, step, True)
            case _:
                pass
    return replace(found, lineages=None if "" in lineages else frozenset(lineages)) if found else None


async def records_since(
    settings: KafkaSettings, topic: str, key: bytes, since: Mapping[TopicPartition, int], *, wait_for_open: bool = False
) -> tuple[list[bytes | None], dict[TopicPartition, int]]:
    """Committed values with this key, in the order of each partition, up to the end as it is now; and where that is.

    From `since`, or from the beginning where it is empty; records that nobody can decode are left out. Up to the first
    record of a transaction that is still open, or behind it once it is over. Kafka's errors are the caller's.
    """
    # Not `seek_to_beginning`: the client's own search for a position, begun by `assign` (default: the end), may be
    # answered after it and win; then the topic seems empty.
    consumer = AIOKafkaConsumer(
        **connection_options(settings),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    found: list[bytes | None] = []
    try:
        await consumer.start()
        partitions = list(since) or await partitions_of(settings, topic)
        ends = await (log_ends(settings, partitions) if wait_for_open else consumer.end_offsets(partitions))
        if all(since.get(tp) == ends[tp] for tp in partitions):
            return found, ends  # nothing new, the usual case: no fetch
        consumer.assign(partitions)
        for tp in since:
            consumer.seek(tp, since[tp])
        async for fetched in fetch_up_to(settings, consumer, ends):
            for records in fetched.values():
                known = [record for record in records if not isinstance(record, Undecodable)]
                found += [record.value for record in known if record.key == key]
        return found, {tp: await consumer.position(tp) for tp in partitions}
    finally:
        await consumer.stop()


async def partitions_of(settings: KafkaSettings, topic: str) -> list[TopicPartition]:
    """All partitions of a topic, as soon as the broker has it."""
    backoff = Backoff(logger)
    while True:
        found = await _describe(settings, topic)
        if found:
            return [TopicPartition(topic, number) for number in sorted(found)]
        await backoff.wait(f"topic {topic} does not exist yet")


async def _describe(settings: KafkaSettings, topic: str) -> list[int]:
    admin = AIOKafkaAdminClient(**connection_options(settings))
    try:
        await admin.start()
        described = (await admin.describe_topics([topic]))[0]
        return [int(partition["partition"]) for partition in described["partitions"]]
    finally:
        await admin.close()

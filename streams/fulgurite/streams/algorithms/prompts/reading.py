"""What came of candidates: their rollouts' rewards from `trajectories`, and what was said in them from `spans`.

Rewards decide, and are read exactly: from the committed offsets on, so a restart reads them again. Spans are for the
critic's eyes; every one of a rollout lies before its trajectory, so they are complete when the rewards are.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from aiokafka import TopicPartition

from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch_up_to, log_ends, value_of
from fulgurite.schemas.codec import decode, split_lines
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.spans import Span
from fulgurite.schemas.topics import SPANS
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.memory import connected
from fulgurite.streams.trainer.log import partitions_of
from fulgurite.streams.trainer.reader import Record, TrajectoryReader
from fulgurite.streams.transactions import patiently

logger = logging.getLogger(__name__)

MAX_SPANS = 200
"""Of a rollout, for the critic."""

_POLL_SECONDS = 0.25
_REPORT_SECONDS = 10.0


async def results_of(
    reader: TrajectoryReader, run_id: str, wanted: Sequence[str], deadline_seconds: float
) -> dict[str, Trajectory]:
    """The trajectories of these rollouts, once all are there or time is up; then those that are missing never come."""
    needle = run_id.encode()
    missing = set(wanted)
    found: dict[str, Trajectory] = {}
    begun = reported = time.monotonic()
    while missing:
        for record in await reader.poll(_POLL_SECONDS):
            trajectory = _trajectory(record) if needle in (record.value or b"") else None
            if trajectory is not None and trajectory.rollout_id in missing:
                missing.discard(trajectory.rollout_id)
                found[trajectory.rollout_id] = trajectory
        now = time.monotonic()
        if now - begun > deadline_seconds and await reader.caught_up():
            logger.warning("%d of %d rollouts did not end in time: they have no reward", len(missing), len(wanted))
            break
        if now - reported > _REPORT_SECONDS:
            reported = now
            logger.info("waiting for %d of %d rollouts", len(missing), len(wanted))
    return found


async def span_ends(settings: KafkaSettings) -> dict[int, int]:
    """Where `spans` ends now."""
    partitions = await partitions_of(settings, settings.topic(SPANS))

    async def ask() -> dict[int, int]:
        async with connected(settings) as consumer:
            return {tp.partition: end for tp, end in (await consumer.end_offsets(partitions)).items()}

    return await patiently("the end of spans", ask)


async def spans_of(
    settings: KafkaSettings, since: Mapping[int, int], attempts: Mapping[str, str], run_id: str
) -> dict[str, list[Span]]:
    """The spans of these rollouts' attempts, in the order of their starts, without tokens. `attempts`: by rollout."""
    topic = settings.topic(SPANS)

    async def read() -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = defaultdict(list)
        async with connected(settings) as consumer:
            partitions = [TopicPartition(topic, number) for number in since]
            begins, ends = await consumer.beginning_offsets(partitions), await log_ends(settings, partitions)
            consumer.assign(partitions)
            for tp in partitions:
                consumer.seek(tp, min(max(since[tp.partition], begins[tp]), ends[tp]))
            async for fetched in fetch_up_to(settings, consumer, ends):
                for records in fetched.values():
                    for record in records:
                        if not isinstance(record, Undecodable):
                            _take(record.value or b"", run_id.encode(), attempts, found)
        return {rollout_id: sorted(spans, key=lambda span: span.start_ns) for rollout_id, spans in found.items()}

    return await patiently("what was said", read)


def _take(value: bytes, needle: bytes, attempts: Mapping[str, str], found: dict[str, list[Span]]) -> None:
    if needle not in value:
        return
    for line in split_lines(value)[1]:
        try:
            span = decode(Span, line)
        except InvalidEvent:
            continue  # the materialiser keeps it as a dead letter
        own = attempts.get(span.rollout_id)
        if own is not None and span.attempt_id in (own, "") and len(found[span.rollout_id]) < MAX_SPANS:
            found[span.rollout_id].append(span.without_tokens())


def _trajectory(record: Record) -> Trajectory | None:
    try:
        return decode(Trajectory, value_of(record))
    except InvalidEvent:
        return None  # the materialiser keeps it as a dead letter

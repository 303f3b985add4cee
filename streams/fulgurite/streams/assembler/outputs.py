"""What a batch looks like on Kafka. Pure; knows topics and the bound of a record, not where batches come from."""

from __future__ import annotations

import logging

from fulgurite.schemas import topics
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import RecordTooLarge
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.streams.assembler.building import without_data
from fulgurite.streams.assembler.letters import of_rollout
from fulgurite.streams.assembler.rollouts import Batch
from fulgurite.streams.transactions import Outgoing

logger = logging.getLogger(__name__)


def records(batch: Batch, settings: KafkaSettings) -> list[Outgoing]:
    """The records of one transaction."""
    found: list[Outgoing] = []
    for trajectory, pending in zip(batch.trajectories, batch.ends, strict=True):
        try:
            found.append(_trajectory(trajectory, settings))
        except MemoryError:
            raise
        except Exception as error:  # as in building.py
            found.append(_trajectory(without_data(trajectory), settings))
            found.append(_dead_letter(of_rollout(pending, error), settings))
    return found + [_dead_letter(letter, settings) for letter in batch.dead_letters]


def _trajectory(trajectory: Trajectory, settings: KafkaSettings) -> Outgoing:
    key = encode_key(trajectory.group_id or trajectory.rollout_id)
    value = fitting(trajectory, settings.max_record_bytes)
    topic = topics.ATTEMPTS if isinstance(trajectory, FinishedAttempt) else topics.TRAJECTORIES
    return Outgoing(settings.topic(topic), key, value)


def fitting(trajectory: Trajectory, bound: int) -> bytes:
    """The trajectory as a record's value, without what does not fit. Never left out altogether: its group waits for
    it."""
    try:
        return encode(trajectory, bound)
    except RecordTooLarge as error:
        return _cut(trajectory, error, bound)


def _cut(trajectory: Trajectory, error: RecordTooLarge, bound: int) -> bytes:
    """What remains in the end, among it `reward`, has bounds of its own far below."""
    partial = ",".join(filter(None, (trajectory.partial, error.reason)))
    spans = {"spans": []} if isinstance(trajectory, FinishedAttempt) else {}
    short = trajectory.model_copy(update={"partial": partial, "sequences": [], **spans})
    try:
        value = encode(short, bound)
    except RecordTooLarge:
        logger.error("rollout %s: sent without sequences, rewards and metadata: %s", trajectory.rollout_id, error)
        return encode(short.model_copy(update={"rewards": [], "metadata": {}}), bound)
    logger.error("rollout %s: sent without its sequences: %s", trajectory.rollout_id, error)
    return value


def _dead_letter(letter: DeadLetter, settings: KafkaSettings) -> Outgoing:
    value, headers = letter.value_within(settings.max_record_bytes), letter.headers()
    if value != letter.value:
        logger.error(
            "dead letter without its value, which fills a record: %s-%d@%d",
            letter.topic,
            letter.partition,
            letter.offset,
        )
    return Outgoing(settings.topic(topics.DEAD_LETTERS), letter.key, value, headers)

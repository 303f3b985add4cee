"""`fulgurite track`: reads a run from the topic's beginning and follows it until it is over.

Nothing is committed: the topic is small (a record a step), and reading it again is what makes a restart harmless.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from fulgurite.consumers.tracking.writers import TensorBoard, WeightsAndBiases, Writer
from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch
from fulgurite.producers.service import run_service
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.errors import InvalidEvent, SettingsError
from fulgurite.schemas.settings import KafkaSettings, Settings
from fulgurite.schemas.topics import TRAINING
from fulgurite.schemas.training import TRAINING_EVENT, RunFinished, RunStarted, TrainingStep

logger = logging.getLogger(__name__)

_POLL_MS = 500


def main(settings: Settings, run_id: str, tensorboard: Path | None, wandb: str | None) -> int:
    """Exit code 0 when the run is over, or this was asked to stop. Raises SettingsError where nothing is to be written
    to, or a package is missing."""
    writers: list[Writer] = []
    if tensorboard is not None:
        writers.append(TensorBoard(tensorboard, run_id))
    if wandb is not None:
        writers.append(WeightsAndBiases(wandb, run_id))
    if not writers:
        raise SettingsError("nothing to write to: name a folder with --tensorboard, or a project with --wandb")
    try:
        return run_service("track", settings.log, lambda stop: track(settings.kafka, run_id, writers, stop))
    finally:
        for writer in writers:
            writer.close()


async def track(settings: KafkaSettings, run_id: str, writers: Sequence[Writer], stop: asyncio.Event) -> None:
    """Until the run is over or `stop` is set. Waits for Kafka for as long as it takes."""
    tracker = Tracker(run_id, writers)
    backoff = Backoff(logger)
    while not (stop.is_set() or tracker.is_over):
        try:
            await _follow(settings, tracker, stop)
        except (KafkaError, TimeoutError) as error:
            await backoff.wait(f"reading {settings.topic(TRAINING)}: {error!r}")


class Tracker:
    """Takes the records of all runs, in the order of the log, and writes its own run's steps, each once."""

    def __init__(self, run_id: str, writers: Sequence[Writer]) -> None:
        self._run_id = run_id
        self._writers = writers
        self._newest = 0
        self.is_over = False

    def take(self, key: bytes | None, value: bytes | None) -> None:
        if key != self._run_id.encode():
            return
        try:
            event = decode_union(TRAINING_EVENT, "TrainingEvent", value)
        except InvalidEvent as error:
            logger.warning("%s", error)  # the materialiser keeps it as a dead letter
            return
        match event:
            case RunStarted():
                for writer in self._writers:
                    writer.begin(event)
            case TrainingStep() if event.step > self._newest:
                for writer in self._writers:
                    writer.write(event)
                self._newest = event.step
            case RunFinished():
                self.is_over = True
                logger.info("run %s is over: %d steps", self._run_id, self._newest)
            case _:
                pass


async def _follow(settings: KafkaSettings, tracker: Tracker, stop: asyncio.Event) -> None:
    # Without a group all partitions are its own, and no offset is remembered.
    consumer: AIOKafkaConsumer = AIOKafkaConsumer(
        settings.topic(TRAINING),
        **connection_options(settings),
        group_id=None,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )
    try:
        await consumer.start()
        while not (stop.is_set() or tracker.is_over):
            for records in (await fetch(settings, consumer, timeout_ms=_POLL_MS)).values():
                for record in records:
                    if not isinstance(record, Undecodable):
                        tracker.take(record.key, record.value)
    finally:
        await consumer.stop()

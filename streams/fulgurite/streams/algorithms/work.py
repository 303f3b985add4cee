"""One record's way through the function: decoded, chosen, tried, and what came of it as records to publish.

Promises: a Worker never raises for a bad record or a function that fails: what comes of it is dead letters with the
reason, or AlgorithmFailed where the settings say stop; TooManyHung where too many calls never ended. Does not know
offsets or transactions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, cast

from pydantic import BaseModel

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.redaction import redactor
from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode_union, split_lines
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import FulguriteError, InvalidEvent
from fulgurite.schemas.exports import EVENTS
from fulgurite.schemas.settings import Settings
from fulgurite.streams.algorithms.calls import PlainCalls, TooManyHung
from fulgurite.streams.algorithms.definition import Algorithm, InputRefused
from fulgurite.streams.algorithms.events import Publisher
from fulgurite.streams.algorithms.groups import Record
from fulgurite.streams.transactions import Outgoing

logger = logging.getLogger(__name__)

FAILED = "algorithm_failed"
_FIRST_PAUSE_SECONDS = 0.2
_LINES = frozenset({topics.SPANS, topics.REWARDS})
_AFTER_END = frozenset({"trajectories", "groups", "attempts"})
_ONLY_READER = frozenset({topics.ATTEMPTS})
"""Topics whose bad records nobody else makes dead letters of."""


class AlgorithmFailed(FulguriteError):
    """The function failed with one input, as often as algorithm.tries says, and algorithm.on_error is stop."""


class Worker:
    """Calls one algorithm's function."""

    def __init__(self, settings: Settings, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._settings = settings.algorithm
        self._stage = f"algorithm:{algorithm.name}"
        self._publisher = Publisher(
            settings.kafka, algorithm.name, algorithm.reads in _AFTER_END, redactor(settings.redaction)
        )
        self._calls = PlainCalls()

    def events_of(self, record: Record) -> tuple[list[tuple[int, BaseModel]], list[Outgoing]]:
        """The events of a record that are wanted, with their lines; and dead letters of those that are none."""
        topic = self._algorithm.topic
        if isinstance(record, Undecodable):
            lost = self._dead(record, 0, record.value or b"", "undecodable", record.why)
            return [], [lost] if topic in _ONLY_READER else []
        values = [record.value or b""]
        numbers: Sequence[int] = (0,)
        if topic in _LINES:
            numbers, values = split_lines(record.value or b"")
        found: list[tuple[int, BaseModel]] = []
        dead: list[Outgoing] = []
        for number, value in zip(numbers, values, strict=True):
            try:
                event: BaseModel = decode_union(EVENTS[topic], topic.name, value)
            except InvalidEvent as error:
                logger.warning("%s-%d offset %d: %s", record.topic, record.partition, record.offset, error)
                if topic in _ONLY_READER:
                    dead.append(self._dead(record, number, value, error.reason, str(error)))
                continue
            if self._algorithm.selects(event):
                found.append((number, event))
        return found, dead

    async def on_events(self, record: Record, events: Sequence[tuple[int, BaseModel]]) -> list[Outgoing]:
        """What comes of a record's events, one after the other."""
        found: list[Outgoing] = []
        for number, event in events:
            found += await self._give(event, [(record, number)])
        return found

    async def on_group(self, trajectories: Sequence[BaseModel], records: Sequence[Record]) -> list[Outgoing]:
        """What comes of a group."""
        return await self._give(list(trajectories), [(record, 0) for record in records])

    async def _give(self, given: Any, records: Sequence[tuple[Record, int]]) -> list[Outgoing]:
        backoff = Backoff(logger, _FIRST_PAUSE_SECONDS)
        where = ", ".join(f"{record.topic}-{record.partition}@{record.offset}" for record, _ in records[:4])
        number = 0
        self._calls.check()
        while True:
            number += 1
            try:
                return await self._tried(given, records)
            except TooManyHung:
                raise
            except Exception as error:  # a function of the user's may raise anything
                problem = f"{self._algorithm.name} failed with {where}: {type(error).__name__}: {error}"
                if number >= self._settings.tries:
                    return self._fail(problem, given, records, error)
            await backoff.wait(problem)

    async def _tried(self, given: Any, records: Sequence[tuple[Record, int]]) -> list[Outgoing]:
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                events = await self._algorithm.run(given, self._calls)
        except InputRefused as error:
            return self._refused(records, error)  # raises for events that cannot be published, as the line below does
        return [self._publisher.record(event) for event in events]

    def _refused(self, records: Sequence[tuple[Record, int]], error: InputRefused) -> list[Outgoing]:
        logger.warning("%s: %s: %s", self._algorithm.name, error.reason, error)
        if not isinstance(cast(object, error.reason), str):
            raise TypeError(f"InputRefused: its reason must be a text, not {type(error.reason).__name__}")
        published = [self._publisher.record(event) for event in error.events]
        return published + self._bury(records, error.reason, str(error))

    def _fail(
        self, problem: str, given: Any, records: Sequence[tuple[Record, int]], error: Exception
    ) -> list[Outgoing]:
        if self._algorithm.instead is not None and not isinstance(error, TimeoutError | MemoryError):
            logger.error("%s: a dead letter", problem, exc_info=error)
            return [self._publisher.record(self._algorithm.instead(given)), *self._bury(records, FAILED, problem)]
        if self._settings.on_error == "stop":
            raise AlgorithmFailed(
                f"{problem} ({self._settings.tries} tries). Nothing of it was published; a restart begins with it. "
                "Mend the function, or set algorithm.on_error = dead_letter to pass over such inputs"
            ) from error
        logger.error("%s (%d tries): a dead letter", problem, self._settings.tries, exc_info=error)
        return self._bury(records, FAILED, problem)

    def _bury(self, records: Sequence[tuple[Record, int]], reason: str, message: str) -> list[Outgoing]:
        dead: list[Outgoing] = []
        for record, number in records:
            values = split_lines(record.value or b"")[1] if self._algorithm.topic in _LINES else [record.value or b""]
            value = values[number] if number < len(values) else record.value or b""
            dead.append(self._dead(record, number, value, reason, message))
        return dead

    def _dead(self, record: Record, line: int, value: bytes, reason: str, message: str) -> Outgoing:
        letter = DeadLetter(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stage=self._stage,
            reason=reason,
            message=message,
            key=record.key,
            value=value,
            line=line,
        )
        return self._publisher.dead_letter(letter)

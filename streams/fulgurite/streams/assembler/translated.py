"""How far the translator is with `otlp_spans`: the questions of all rollouts that wait (waits.py), asked together.

    every ASK_SECONDS, where anything is to be asked       otlp_spans: which partitions, their begins and ends
                                                           the translator's group: what it has committed
                                                           where waves are complete by that: the ends of `rewards`
    every LOOK_SECONDS, while there is no translator       the same, but for the last

There is a translator when its group has committed anything on otlp_spans: it does so as soon as it starts for the first
time, and Kafka remembers it while it is away (offsets.retention.minutes, a week by default). A partition that lost what
the translator had not read (retention) is read up to where the log begins.

Promises: while Kafka answers nothing, nobody's time is up; when it answers but not this (no permission, the topic is
gone), time goes on, so that every wait has its bound. Nothing is remembered over a restart: those that had not been
emitted wait anew, behind ends asked for then, which lie at or behind those of before.

Does not know which rollouts wait, or why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from fulgurite.consumers.committed import committed
from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import OTLP_SPANS, TRANSLATOR_GROUP
from fulgurite.streams.assembler.assembly import Assembly
from fulgurite.streams.assembler.inputs import Inputs
from fulgurite.streams.assembler.rollouts import Pending
from fulgurite.streams.transactions import Hook

logger = logging.getLogger(__name__)

ASK_SECONDS: Final = 0.2
"""Least time between two questions: a few small requests for all that wait."""
LOOK_SECONDS: Final = 1.0
"""How soon the first translator ever is noticed. Its first rewards may be late by that, once."""
FIRST_LOOK_SECONDS: Final = 10.0
"""Longest that a start waits to know, of a Kafka that answers: after a broker's start the group's coordinator is
loading, for a second or so."""
ANSWER_SECONDS: Final = 5.0
"""Longest wait for one answer: aiokafka asks for a partition that does not exist without end."""
_REPORT_SECONDS: Final = 10.0

_NO_ANSWER = (KafkaError, TimeoutError, OSError)


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the translator."""

    in_use: bool
    ends: dict[TopicPartition, int]
    read_to: dict[TopicPartition, int]


class Translator:
    """The questions, asked over a connection of their own. Raises what aiokafka raises: one try."""

    def __init__(self, settings: KafkaSettings, inputs: Inputs) -> None:
        self.topic = settings.topic(OTLP_SPANS)
        self.group = f"{settings.topic_prefix}{TRANSLATOR_GROUP}"
        self._settings = settings
        self._inputs = inputs
        self._admin: AIOKafkaAdminClient | None = None

    async def partitions(self) -> list[TopicPartition]:
        """Of otlp_spans; none where there is no such topic. Answered by any broker, whatever may be asked of it."""
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await (await self._connected()).describe_topics([self.topic])
        return [TopicPartition(self.topic, part["partition"]) for topic in found for part in topic["partitions"]]

    async def progress(self, partitions: list[TopicPartition]) -> Progress:
        async with asyncio.timeout(ANSWER_SECONDS):
            ends = await self._inputs.end_offsets(partitions)
            begins = await self._inputs.begin_offsets(partitions)
            done = await committed(await self._connected(), self.group, partitions)
        read_to = {tp: max(begin, done[tp].offset if tp in done else 0) for tp, begin in begins.items()}
        return Progress(bool(done), ends, read_to)

    async def close(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            await admin.close()

    async def _connected(self) -> AIOKafkaAdminClient:
        if self._admin is None:
            admin = AIOKafkaAdminClient(**connection_options(self._settings))
            try:
                await admin.start()
            except BaseException:
                await admin.close()
                raise
            self._admin = admin
        return self._admin


class Watch:
    """The task that asks, and lets go of those that wait."""

    def __init__(
        self, translator: Translator, inputs: Inputs, state: Assembly, changed: asyncio.Event, hook: Hook
    ) -> None:
        self._translator = translator
        self._inputs = inputs
        self._state = state
        self._waits = state.waits
        self._changed = changed
        """Set when somebody waits no longer."""
        self._hook = hook
        self._rewards = [tp for tp in state.data if tp.topic == inputs.rewards_topic]
        self._silent_since: float | None = None
        """Since when Kafka has answered nothing."""
        self._said = float("-inf")

    async def first_look(self) -> None:
        """Whether there is a translator, before anything is emitted. Waits for Kafka, for as long as it takes."""
        begun = self._waits.now()
        while not await self._look():
            if self._silent_since is None and self._waits.now() - begun >= FIRST_LOOK_SECONDS:
                return
            await asyncio.sleep(ASK_SECONDS)

    async def run(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(ASK_SECONDS)
            looks_for_one = not self._waits.in_use and time.monotonic() - looked >= LOOK_SECONDS
            if looks_for_one or self._waits.has_questions():
                await self._look()
                looked = time.monotonic()

    async def close(self) -> None:
        await self._translator.close()

    async def _look(self) -> bool:
        """Asks, and acts on it. Whether there was an answer."""
        settled = self._waits.settled()
        partitions = await self._partitions()
        if partitions is None:
            return False
        progress: Progress | None = None
        try:
            if partitions:
                progress = await self._translator.progress(partitions)
                await self._act(settled, progress)
            elif not self._waits.in_use:
                return True  # Of a topic that is gone while somebody waits nothing is known: their time goes on.
        except _NO_ANSWER as error:
            self._say("cannot ask what %s has read of %s: %r", self._translator.group, self._translator.topic, error)
            await self._translator.close()
        self._give_up(progress)
        return progress is not None

    async def _partitions(self) -> list[TopicPartition] | None:
        """None where Kafka is away."""
        asked = time.monotonic()
        try:
            found = await self._translator.partitions()
        except _NO_ANSWER as error:
            logger.debug("no answer from Kafka: %r", error)
            self._silent_since = asked if self._silent_since is None else self._silent_since
            await self._translator.close()
            return None
        if self._silent_since is not None:
            self._waits.away(time.monotonic() - self._silent_since)
            self._silent_since = None
        return found

    async def _act(self, settled: list[Pending], progress: Progress) -> None:
        if progress.in_use != self._waits.in_use:
            self._waits.in_use = progress.in_use
            found = "rollouts without a reward wait for theirs" if progress.in_use else "no more: nobody waits for any"
            logger.info(
                "rewards in %s, of the translator %s: %s", self._translator.topic, self._translator.group, found
            )
        if not progress.in_use:
            self._waits.release_all()
            self._changed.set()
            return
        self._waits.asked(settled, progress.ends)
        if complete := self._waits.translated(progress.read_to):
            async with asyncio.timeout(ANSWER_SECONDS):
                barrier = await self._inputs.end_offsets(self._rewards)
            self._waits.release(complete, barrier)
            self._hook("translated")
            self._changed.set()

    def _give_up(self, progress: Progress | None) -> None:
        left = "nobody knows how many" if progress is None else self._waits.behind(progress.read_to)
        overdue = self._waits.give_up()
        if not overdue:
            return
        self._state.counts["otlp_overdue"] += len(overdue)
        self._changed.set()
        self._say(
            "%d rollouts waited %g s (assembler.otlp_wait_seconds) for rewards in %s, and are emitted without: "
            "the translator (%s) has %s records to read; is it running?",
            len(overdue),
            self._waits.wait_seconds,
            self._translator.topic,
            self._translator.group,
            left,
        )

    def _say(self, message: str, *values: object) -> None:
        """At most one warning in _REPORT_SECONDS."""
        now = time.monotonic()
        if now - self._said >= _REPORT_SECONDS:
            self._said = now
            logger.warning(message, *values)

"""Prompt templates for agents: the newest version of each, or the one that a rollout is pinned to.

    template = await rollout.prompt_template("support")     # plain functions: rollout.prompt_template_sync("support")
    prompt = template.render(question=task["question"])

Follows `resources` from the first time somebody asks. Promises: a template that was published before the rollout was
queued is found, whatever the reader's lag; a rollout that is pinned (`resources_id` = resource@version) gets exactly
that version, or an error that says which one there is instead. Nobody who asks waits longer than WAIT_SECONDS.

What a pin means. While prompts are searched for, each candidate is a resource of its own whose metadata say of which
template (`candidate_of`); a rollout pinned to one gets it when it asks for that template, and the newest of all others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.reading import Fetched, fetch, log_ends, value_of
from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import FulguriteError, InvalidEvent
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import RESOURCES

logger = logging.getLogger(__name__)

CANDIDATE_OF = "candidate_of"
"""In the metadata of a candidate: the template that it may become a version of."""

MAX_TEMPLATES = 10_000
"""Names in memory; the ones not seen for longest are let go of."""
WAIT_SECONDS = 30.0

_POLL_MS = 500
_CLOSE_SECONDS = 2.0
_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class NoTemplate(FulguriteError):
    """The template that was asked for is not there; the message says what is."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with {places}."""

    resource: str
    version: int
    text: str

    @property
    def pin(self) -> str:
        """What names exactly this version."""
        return pin_of(self.resource, self.version)

    @property
    def places(self) -> list[str]:
        """What values can be put into, as it stands in the text.

        >>> PromptTemplate("p", 1, "{b} {a} {b} {'json': 1}").places
        ['{b}', '{a}']
        """
        return list(dict.fromkeys(place[0] for place in _PLACE.finditer(self.text)))

    def render(self, **values: Any) -> str:
        """The text with values in their places; other braces stay as they are.

        >>> PromptTemplate("p", 1, "Answer {question} as {'json': 1} or {x}.").render(question="1+1?")
        "Answer 1+1? as {'json': 1} or {x}."
        """
        return _PLACE.sub(lambda place: str(values.get(place[1], place[0])), self.text)


def pin_of(resource: str, version: int) -> str:
    """`resources_id` of a rollout that is to use this version.

    >>> pin_of("support.c3", 17)
    'support.c3@17'
    """
    return f"{resource}@{version}"


def parse_pin(pin: str) -> tuple[str, int] | None:
    """None for a `resources_id` that pins nothing of ours."""
    found = re.fullmatch(r"(.+)@(0|[1-9][0-9]{0,18})", pin)
    return (found[1], int(found[2])) if found else None


class PromptTemplates:
    """One reader for all agents of a process. Use from one event loop."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._templates: dict[str, ResourceVersion] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._partitions: list[TopicPartition] = []
        self._following: asyncio.Task[None] | None = None
        self._read = asyncio.Condition()

    async def get(self, name: str, pin: str = "") -> PromptTemplate:
        """The template of this name, as a rollout with this pin sees it. Raises NoTemplate."""
        self._following = self._following or asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                found = self._find(name, pin)
                if isinstance(found, str):
                    await self._catch_up()
                    found = self._find(name, pin)
        except TimeoutError:
            raise NoTemplate(
                f"prompt template {name}: Kafka did not answer within {WAIT_SECONDS:g} s, or somebody's transaction on "
                f"{self._settings.topic(RESOURCES)} was open for as long"
            ) from None
        if isinstance(found, str):
            raise NoTemplate(found)
        return PromptTemplate(found.resource, found.version, found.content)

    async def close(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    def _find(self, name: str, pin: str) -> ResourceVersion | str:
        """The version, or why there is none."""
        if (parsed := parse_pin(pin)) is not None:
            resource, version = parsed
            pinned = self._templates.get(resource)
            if pinned is None:
                return f"the rollout is pinned to {pin}, which is not on {self._settings.topic(RESOURCES)}"
            if name in (resource, pinned.metadata.get(CANDIDATE_OF)):
                wanted = pinned.version == version
                return pinned if wanted else f"the rollout is pinned to {pin}; what there is is {pinned.version}"
        newest = self._templates.get(name)
        if newest is None:
            return f"no prompt template {name}; there are: {', '.join(sorted(self._templates)[:20]) or 'none'}"
        return newest

    async def _catch_up(self) -> None:
        """Until everything that was published before this call has been read, behind others' open transactions, too."""
        async with self._read:
            await self._read.wait_for(lambda: self._consumer is not None)
        backoff = Backoff(logger)
        while True:
            try:
                ends = await log_ends(self._settings, self._partitions)
                async with self._read:
                    assert self._consumer is not None
                    while any([await self._consumer.position(tp) < ends[tp] for tp in self._partitions]):
                        await self._read.wait()
                return
            except KafkaError as error:
                await backoff.wait(f"reading prompt templates: {error!r}")

    async def _follow(self) -> None:
        consumer = await self._connected()
        try:
            while True:
                try:
                    found = await fetch(self._settings, consumer, timeout_ms=_POLL_MS)
                except KafkaError as error:
                    logger.warning("reading prompt templates: %r; trying again", error)
                    await asyncio.sleep(_POLL_MS / 1000)
                    continue
                async with self._read:
                    for records in found.values():
                        for record in records:
                            self._take(record)
                    self._read.notify_all()
        finally:
            self._consumer = None
            with contextlib.suppress(KafkaError, TimeoutError):
                await asyncio.wait_for(consumer.stop(), _CLOSE_SECONDS)

    async def _connected(self) -> AIOKafkaConsumer:
        backoff = Backoff(logger)
        topic = self._settings.topic(RESOURCES)
        while True:
            consumer = AIOKafkaConsumer(
                **connection_options(self._settings),
                isolation_level="read_committed",
                enable_auto_commit=False,
                auto_offset_reset="earliest",
            )
            try:
                await consumer.start()
                numbers = consumer.partitions_for_topic(topic) or {0}
                self._partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
                consumer.assign(self._partitions)
            except (KafkaError, TimeoutError) as error:
                await consumer.stop()
                await backoff.wait(f"reading prompt templates: {error!r}")
            except BaseException:
                await consumer.stop()
                raise
            else:
                async with self._read:
                    self._consumer = consumer
                    self._read.notify_all()
                return consumer

    def _take(self, record: Fetched) -> None:
        try:
            version = decode(ResourceVersion, value_of(record))
        except InvalidEvent:
            return  # the materialiser keeps it as a dead letter
        if version.kind != "prompt_template":
            return
        self._templates.pop(version.resource, None)
        self._templates[version.resource] = version
        while len(self._templates) > MAX_TEMPLATES:
            del self._templates[next(iter(self._templates))]

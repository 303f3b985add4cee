"""Who makes versions of a resource: one run at a time. Another writer ends this run with a clear error (exit 2).

Fencing keeps two processes of *one* run apart, but `fulgurite publish` and other runs have ids of their own. So for
each version, while the learner works, the trainer reads what was added to `resources` since it last looked: from its
own first announcement on, every announcement of the resource must be its own, told by event id
(`events.version_event`).

What that catches, and when: a foreign version that was there before the look stops the run before it announces its
own. One that comes between the look and the commit lies in the log after the last look, whichever of the two is first
there, and is found by the next look: two writers never go on side by side for more than one version. Reads
with read_committed, so a version is only ever seen committed. The last writer has the resource, as followers see it.
"""

from __future__ import annotations

import logging

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from fulgurite.producers.backoff import Backoff
from fulgurite.schemas.codec import decode
from fulgurite.schemas.errors import InvalidEvent, SettingsError
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import RESOURCES
from fulgurite.streams.trainer.events import version_event_id
from fulgurite.streams.trainer.log import records_since

logger = logging.getLogger(__name__)


class ResourceTaken(SettingsError):
    """Somebody else announced a version of the resource that this run trains. A restart would find it again."""


class Ownership:
    """One resource, as one run sees it. `take_over` comes first for a new run, `check` for one that goes on."""

    def __init__(self, settings: KafkaSettings, resource: str, run_id: str) -> None:
        self._settings = settings
        self._resource = resource
        self._run_id = run_id
        self._next: dict[TopicPartition, int] = {}
        """Where the next look begins; empty before the first one."""
        self._owned = False
        """Whether everything from `_next` on must be this run's."""

    async def take_over(self) -> int:
        """For a new run: what was announced so far is history. The newest version's number, 0 where there is none."""
        announced = await self._look(wait_for_open=True)  # a number that one of them has may be the next
        self._owned = True
        return max((version.version for version in announced), default=0)

    async def check(self) -> None:
        """Raises ResourceTaken where another writer announced a version since this run's first one, or the newest."""
        announced = await self._look()
        for version in announced:
            if version.run_id == self._run_id and version.event_id == version_event_id(self._run_id, version.version):
                self._owned = True
            elif self._owned or version is announced[-1]:  # compaction may have taken our own away
                writer = f"run {version.run_id}" if version.run_id else "a writer without run_id"
                raise ResourceTaken(
                    f"resource {self._resource}: version {version.version} was announced by {writer} ({version.uri}), "
                    f"but run {self._run_id} makes its versions. One writer at a time: this run ends here and its "
                    "name cannot go on. Start a new one: another trainer.run_id, with trainer.model set to the "
                    "version's folder to go on from, or another trainer.resource"
                )

    async def _look(self, *, wait_for_open: bool = False) -> list[ResourceVersion]:
        """What was announced since the last look, in the log's order; behind others' open transactions only if they are
        waited for. Waits for Kafka for as long as it takes."""
        backoff = Backoff(logger)
        topic = self._settings.topic(RESOURCES)
        while True:
            try:
                values, self._next = await records_since(
                    self._settings, topic, self._resource.encode(), self._next, wait_for_open=wait_for_open
                )
                return [version for value in values if (version := _version(value))]
            except (KafkaError, TimeoutError) as error:
                await backoff.wait(f"reading who makes versions of {self._resource}: {error!r}")


def _version(value: bytes | None) -> ResourceVersion | None:
    try:
        return decode(ResourceVersion, value)
    except InvalidEvent:
        return None  # the materialiser keeps it as a dead letter

"""The versions of the followed resource, newest known first.

Promises: `newest` never goes back to a lower number; of two records with the same number the later one counts, until a
server was given one of them. From then on the number means those files: spans name what sampled them by it, and a call
that began before such a swap and ended after it would be recorded as if nothing had happened. Bounded: the newest few
are kept, older ones cannot be wanted again. Knows neither servers nor Kafka.
"""

from __future__ import annotations

import asyncio
from typing import Final

from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.resources import ResourceVersion

MAX_KEPT: Final = 8
"""Candidates to fall back to when the newest are unusable; trainers keep about as many versions' files."""

MAX_GIVEN: Final = 10_000
"""Numbers whose files are remembered, the highest."""

Identity = tuple[int, str, str]
Content = tuple[int, str]


def identity(version: ResourceVersion) -> Identity:
    """What makes two records the same version: number, place and content."""
    return version.version, version.uri, version.sha256


def content(version: ResourceVersion) -> Content:
    """What a server that loaded it has: number and checksum; where the files lay does not matter to it."""
    return version.version, version.sha256


class Versions:
    """What the log has said so far."""

    def __init__(self) -> None:
        self._kept: dict[int, ResourceVersion] = {}
        self._given: dict[int, str] = {}
        self._subscribers: list[asyncio.Event] = []
        self._arrived_at = 0.0

    def add(self, version: ResourceVersion) -> None:
        """Raises InvalidEvent (`version_reused`) for other files under a number that a server was given."""
        given = self._given.get(version.version, version.sha256)
        if given != version.sha256:
            raise InvalidEvent(
                "version_reused",
                f"{version.resource} version {version.version} was announced again with other files ({version.sha256}) "
                f"after servers had been given {given}: publish them under a number of their own",
            )
        self._kept[version.version] = version
        while len(self._kept) > MAX_KEPT:
            del self._kept[min(self._kept)]
        self._arrived_at = asyncio.get_running_loop().time()
        for event in self._subscribers:
            event.set()

    def give(self, version: ResourceVersion) -> None:
        """A server is about to serve it."""
        self._given[version.version] = version.sha256
        if len(self._given) > MAX_GIVEN:
            del self._given[min(self._given)]

    def __contains__(self, key: Identity) -> bool:
        return key[0] in self._kept and identity(self._kept[key[0]]) == key

    @property
    def newest(self) -> ResourceVersion | None:
        return self._kept[max(self._kept)] if self._kept else None

    def wanted(self, refused: set[Identity]) -> ResourceVersion | None:
        """The newest version that is not among `refused`."""
        return next((version for version in self.all() if identity(version) not in refused), None)

    def all(self) -> list[ResourceVersion]:
        """Newest first."""
        return [self._kept[number] for number in sorted(self._kept, reverse=True)]

    async def settled(self, silence_seconds: float) -> None:
        """Returns when nothing has arrived for `silence_seconds`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (silent := loop.time() - max(began, self._arrived_at)) < silence_seconds:  # noqa: ASYNC110 (silence is no event)
            await asyncio.sleep(silence_seconds - silent)

    def subscribe(self) -> asyncio.Event:
        """Set whenever something new arrives; whoever waits for it clears it before comparing."""
        event = asyncio.Event()
        self._subscribers.append(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        self._subscribers.remove(event)

"""A version's files on this machine, verified: where they were announced if that is a local folder, else a copy.

Weights in a local folder are loaded from there: servers see it, and read it once. Adapters are copied always, since a
server may read an adapter again long after it was loaded, when its place in memory was needed for another one, and
because the copy's path then says which content a server has.

Promises: servers that want the same version at once share one fetch and one reading; copies are made and removed one
at a time. A folder that is loaded from where it lies may be written to between the checksum and the end of the load, so
it is looked at once more then: sizes, times and inodes, and where those differ the checksum. Knows neither servers nor
Kafka.
"""

from __future__ import annotations

import asyncio
import stat
from dataclasses import dataclass
from pathlib import Path

from fulgurite.consumers.follower.cache import Cache
from fulgurite.consumers.follower.store import StoreTrouble, Unusable, unreadable
from fulgurite.consumers.follower.versions import Identity, identity
from fulgurite.schemas.checksum import folder_of, folder_sha256
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings

Stamp = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: name, size, times of the last change to its bytes and to anything of it, inode."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A folder whose files had the checksum. The stamp was taken before they were read for it."""

    folder: Path
    sha256: str
    stamp: Stamp

    def ensure_unchanged(self) -> None:
        """Raises Unusable where they have it no longer, StoreTrouble where that cannot be told now. Blocking; reads the
        files only if they were touched."""
        try:
            same = stamp_of(self.folder) == self.stamp or folder_sha256(self.folder) == self.sha256
        except OSError as error:
            raise unreadable(f"the files in {self.folder} cannot be read after they were loaded", error) from None
        if not same:
            raise Unusable(f"the files in {self.folder} were changed while they were loaded")


def stamp_of(folder: Path) -> Stamp:
    found: list[tuple[str, int, int, int, int]] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            about = path.stat()
            name = path.relative_to(folder).as_posix()
            found.append((name, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))
    return tuple(found)


class Files:
    def __init__(self, settings: FollowerSettings) -> None:
        self.cache = Cache(settings)
        self._one_at_a_time = asyncio.Lock()
        self._running: dict[Identity, asyncio.Task[Verified]] = {}

    async def ready(self, version: ResourceVersion) -> Verified:
        """The folder with the version's files. Raises Unusable: what is wrong, and where; StoreTrouble: not now."""
        key = identity(version)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._ready(version))
            self._running[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        return await asyncio.shield(task)

    def _done(self, key: Identity, task: asyncio.Task[Verified]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # who waited may be gone, which is no reason for asyncio to complain

    async def _ready(self, version: ResourceVersion) -> Verified:
        if version.kind not in ("weights", "lora"):
            raise _about(version, f"it is of kind {version.kind}; only weights and lora can be loaded into a server")
        if version.kind == "weights" and version.uri.startswith("file:"):
            return await asyncio.to_thread(_verified, version)
        async with self._one_at_a_time:
            try:
                return await asyncio.to_thread(self._fetched, version)
            except Unusable as error:
                raise _about(version, str(error)) from None

    def _fetched(self, version: ResourceVersion) -> Verified:
        folder = self.cache.fetch(version)
        return Verified(folder, version.sha256, stamp_of(folder))

    async def collect(self) -> list[int]:
        """Removes copies that nobody needs any more. Raises StoreTrouble."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self.cache.collect)

    async def close(self) -> None:
        """Ends fetches under way; what they have stays for the next start."""
        self.cache.stop()
        for result in await asyncio.gather(*self._running.values(), return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, Unusable | StoreTrouble):
                raise result
        self.cache.close()


def _about(version: ResourceVersion, what: str) -> Unusable:
    return Unusable(f"{version.resource} version {version.version}: {what}")


def _verified(version: ResourceVersion) -> Verified:
    try:
        folder = folder_of(version.uri)
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise _about(version, f"{folder} is not a folder on this machine")
        stamp = stamp_of(folder)
        found = folder_sha256(folder)
    except ValueError as error:
        raise _about(version, f"{version.uri} cannot be read: {error}") from None
    except OSError as error:
        raise unreadable(f"{version.resource} version {version.version}: {version.uri} cannot be read", error) from None
    if found != version.sha256:
        raise _about(version, f"the files in {folder} have checksum {found}, announced was {version.sha256}")
    return Verified(folder, found, stamp)

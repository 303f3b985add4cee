"""A version's files on this machine, verified: where they were announced if that is a local folder, else a copy.

Weights in a local folder are loaded from there: servers see it, and read it once. Adapters are copied always, since a
server may read an adapter again long after it was loaded, when its place in memory was needed for another one, and
because the copy's path then says which content a server has.

Promises: servers that want the same version at once share one fetch and one reading; copies are made and removed one
at a time. Knows neither servers nor Kafka.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from fulgurite.consumers.follower.cache import Cache
from fulgurite.consumers.follower.store import StoreTrouble, Unusable
from fulgurite.consumers.follower.versions import Identity, identity
from fulgurite.schemas.checksum import folder_of, folder_sha256
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings


class Files:
    def __init__(self, settings: FollowerSettings) -> None:
        self.cache = Cache(settings)
        self._one_at_a_time = asyncio.Lock()
        self._running: dict[Identity, asyncio.Task[Path]] = {}

    async def ready(self, version: ResourceVersion) -> Path:
        """The folder with the version's files. Raises Unusable: what is wrong, and where; StoreTrouble: not now."""
        key = identity(version)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._ready(version))
            self._running[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        return await asyncio.shield(task)

    def _done(self, key: Identity, task: asyncio.Task[Path]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # who waited may be gone, which is no reason for asyncio to complain

    async def _ready(self, version: ResourceVersion) -> Path:
        if version.kind not in ("weights", "lora"):
            raise _about(version, f"it is of kind {version.kind}; only weights and lora can be loaded into a server")
        if version.kind == "weights" and version.uri.startswith("file:"):
            return await asyncio.to_thread(_verified, version)
        async with self._one_at_a_time:
            try:
                return await asyncio.to_thread(self.cache.fetch, version)
            except Unusable as error:
                raise _about(version, str(error)) from None

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


def _verified(version: ResourceVersion) -> Path:
    try:
        folder = folder_of(version.uri)
        if not folder.is_dir():
            raise _about(version, f"{folder} is not a folder on this machine")
        found = folder_sha256(folder)
    except (ValueError, OSError) as error:
        raise _about(version, f"{version.uri} cannot be read: {error}") from None
    if found != version.sha256:
        raise _about(version, f"the files in {folder} have checksum {found}, announced was {version.sha256}")
    return folder

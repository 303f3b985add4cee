"""LoRA adapters brought into one server: each version is a model of its own, named `<resource>-v<version>`.

Nothing is paused and nothing relabelled: requests under way go on with the adapter they began with, and the next ones
ask for the newest name on the server's own list. So the list is the truth, also for whoever routes requests. The path
of an adapter says its content (see `cache.py`), so one that is on the list with the path it ought to have is served,
also when another process loaded it.

Old ones are unloaded by the retention rule, never the one that is followed or a pinned one. So is what has a higher
number than any on the log, as after a log was begun anew: the next requests would ask for it for ever. Requests that
run on one when it is unloaded go on, those that wait for their turn too; its files stay for them, by the claims of the
cache, until `draining.py` says that there are none. A new request that names it is refused by the server.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fulgurite.consumers.follower.draining import Draining
from fulgurite.consumers.follower.loading import LoadFailed, Phases, Shared
from fulgurite.consumers.follower.server import LOAD_ADAPTER, PolicyServer, Refused, Unreachable
from fulgurite.consumers.follower.store import Unusable
from fulgurite.schemas.resources import ResourceVersion, adapter_name, adapter_version

logger = logging.getLogger(__name__)

_HOW_TO_START = (
    f"it has no route {LOAD_ADAPTER}: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
)


class Adapters:
    def __init__(self, server: PolicyServer, shared: Shared) -> None:
        self.versions: set[int] = set()
        """Of the followed resource, that the server has: as of the last look."""
        self.draining = Draining(server, shared.settings)
        self._paths: dict[str, str] = {}
        self._server = server
        self._settings = shared.settings
        self._cache = shared.files.cache
        self._known = shared.versions

    async def observe(self) -> None:
        """Looks at what the server has. Raises Refused, Unreachable."""
        self._paths = await self._server.models()
        found = (adapter_version(self._settings.resource, name) for name in self._paths)
        self.versions = {version for version in found if version is not None}
        # What is claimed and not listed has left the list, whoever took it off, or may yet come.
        self.draining.follow(self._cache.claimed(self._server.url) - self.versions)

    def serves(self, wanted: ResourceVersion) -> bool:
        path = self._paths.get(adapter_name(wanted.resource, wanted.version))
        return path == str(self._cache.place(wanted))

    async def load(self, wanted: ResourceVersion, folder: Path, clock: Phases) -> None:
        """Raises Unusable, Unreachable; Refused where the server was not started to take adapters."""
        name = adapter_name(wanted.resource, wanted.version)
        if name in self._paths:
            logger.warning("%s has other files as %s; unloading them", self._server.url, name)
            await self._server.unload_adapter(name)
        self._known.give(wanted)
        try:
            await self._server.load_adapter(name, str(folder))
        except Refused as error:
            if error.status in (404, 405) and name not in str(error):
                raise Refused(_HOW_TO_START, error.status) from None  # vLLM's own 404 names the adapter
            raise Unusable(f"the server refused it: {error}") from None
        except Unreachable as error:
            raise LoadFailed(str(error), answered=error.answered) from None
        clock.end("load")
        await self.observe()
        if not self.serves(wanted):
            raise LoadFailed(f"{name} was loaded, but is not among the served models", answered=True)
        clock.end("check")
        await self._unload_old(wanted)
        clock.end("unload")

    async def _unload_old(self, wanted: ResourceVersion) -> None:
        newest = max(wanted.version, *(version.version for version in self._known.all()))
        follow = sorted(version for version in self.versions if version <= newest)
        kept = {wanted.version, *follow[-self._settings.keep_versions :], *self._settings.pinned_versions}
        for version in sorted(self.versions - kept):
            name = adapter_name(self._settings.resource, version)
            try:
                await self._server.unload_adapter(name)
            except (Refused, Unreachable) as error:
                logger.warning("%s keeps the adapter %s until the next version: %s", self._server.url, name, error)
            else:
                logger.info("%s: unloaded the adapter %s", self._server.url, name)
                self.versions.discard(version)

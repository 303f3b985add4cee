"""Full weights brought into one server: paused, loaded, hashed, labelled, resumed, compared.

It remembers what it loaded, since a label says nothing of the files: `loaded` is number and checksum, and None as soon
as it cannot know any more. The steps are numbered in `converge.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fulgurite.consumers.follower.digests import same_weights
from fulgurite.consumers.follower.loading import LoadFailed, Phases, Shared
from fulgurite.consumers.follower.server import PolicyServer, Refused, State, Unreachable
from fulgurite.consumers.follower.store import Unusable
from fulgurite.consumers.follower.turns import Turn
from fulgurite.consumers.follower.versions import Content, content
from fulgurite.schemas.resources import ResourceVersion

logger = logging.getLogger(__name__)

LABEL_LOADING: Final = "loading"
"""Not a decimal number: what is sampled under it has no known version."""
RESUME_TRIES: Final = 10
RESUME_BACKOFF_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Hashed:
    """What the server's weights hashed to after the last load that passed, and from where they came."""

    digest: str
    sha256: str
    folder: Path


class Weights:
    def __init__(self, server: PolicyServer, shared: Shared) -> None:
        self.loaded: Content | None = None
        self._server = server
        self._shared = shared
        self._hashed: _Hashed | None = None

    def observe(self, state: State) -> None:
        """Forgets what was loaded when the server says something else: it was restarted, or somebody else was here."""
        if self.loaded and state.version != self.loaded[0]:
            self.loaded = self._hashed = None
            self._server.forget()
            self._shared.digests.forget(self._server.url)

    async def load(
        self, wanted: ResourceVersion, folder: Path, state: State, clock: Phases, still_wanted: Callable[[], bool]
    ) -> bool:
        """Steps 2 to 8; whether it was still wanted when its turn came. Raises Unusable, Unreachable, Refused."""
        async with self._shared.turns.turn() as turn:
            clock.end("turn")
            if not still_wanted():
                return False
            try:
                await self._server.pause()  # 2
                clock.end("pause")
                await self._swap(wanted, folder, state, clock)  # 3 to 6
            except Unreachable as error:
                if not error.answered:
                    turn.give_back()
                raise
            finally:
                await self._resume(turn)  # 7
        clock.end("resume")
        served = await self._server.state()  # 8
        if served.version != wanted.version:
            raise Unreachable(f"serves {served.label!r} after version {wanted.version} was loaded", answered=True)
        return True

    async def _swap(self, wanted: ResourceVersion, folder: Path, state: State, clock: Phases) -> None:
        if state.version is not None:  # else the label names no version, or there are no weights to label
            await self._server.set_label(LABEL_LOADING)  # 3
        loaded, self.loaded = self.loaded, None
        try:
            await self._server.reload_weights(str(folder))  # 4
        except Refused as error:
            # Refused means untouched: the weights are what they were.
            if state.version is not None:
                await self._server.set_label(str(state.version))
            self.loaded = loaded
            raise Unusable(f"the server refused it: {error}") from None
        except Unreachable as error:
            raise LoadFailed(str(error), answered=error.answered) from None
        clock.end("load")
        if self._shared.settings.check_weights:
            await self._check(wanted, folder)  # 5
            clock.end("check")
        await self._server.set_label(str(wanted.version))  # 6
        self.loaded = content(wanted)

    async def _check(self, wanted: ResourceVersion, folder: Path) -> None:
        digest = await self._server.weights_digest()
        if digest is None:
            return
        before = self._hashed  # stays after a problem, for the next try to be compared with
        problem = self._shared.digests.contradiction(self._server.url, wanted.sha256, digest)
        if not problem and before and before.digest == digest and before.sha256 != wanted.sha256:
            same = await asyncio.to_thread(same_weights, before.folder, folder)
            if same is False:
                problem = "its weights are the same as before, though the files are others"
            elif same is None:
                logger.warning(
                    "%s has the same weights as before version %d; whether the files before had them cannot be told",
                    self._server.url,
                    wanted.version,
                )
        if problem:
            raise LoadFailed(f"version {wanted.version} was loaded, but {problem}", answered=True)
        self._hashed = _Hashed(digest, wanted.sha256, folder)

    async def _resume(self, turn: Turn) -> None:
        """Step 7. Shielded: a stop of this process waits for it."""
        resuming = asyncio.ensure_future(self._resume_until_done(turn))
        try:
            await asyncio.shield(resuming)
        except asyncio.CancelledError:
            with contextlib.suppress(Unreachable, Refused):
                await resuming
            raise

    async def _resume_until_done(self, turn: Turn) -> None:
        for tries in range(1, RESUME_TRIES + 1):
            try:
                await self._server.resume()
            except (Unreachable, Refused) as error:
                if tries == RESUME_TRIES:
                    raise  # gone, or restarted; the next comparison finds out
                if isinstance(error, Unreachable) and not error.answered:
                    turn.give_back()
                await asyncio.sleep(RESUME_BACKOFF_SECONDS)
            else:
                return

"""Full weights brought into one server: paused, loaded, hashed, labelled, resumed, compared.

It remembers what it loaded, since a label says nothing of the files: `loaded` is number and checksum, and None as soon
as it cannot know any more. The steps are numbered in `converge.py`.

Promises: a server is resumed only with weights that are known to be whole: those it had, if no load began; those of the
version; those of a version before it, where the load failed. With anything else it stays paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fulgurite.consumers.follower.digests import WEIGHT_SUFFIXES, same_weights
from fulgurite.consumers.follower.files import Verified
from fulgurite.consumers.follower.layout import Layout, check_alike, is_tied, read_layout
from fulgurite.consumers.follower.loading import LoadFailed, LoadUncertain, Phases, Shared
from fulgurite.consumers.follower.server import LABEL_LOADING, PolicyServer, Refused, State, Unreachable
from fulgurite.consumers.follower.store import StoreTrouble, Unusable, unreadable
from fulgurite.consumers.follower.transfer import Transfer
from fulgurite.consumers.follower.turns import Turn
from fulgurite.consumers.follower.versions import Content, content, identity
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.resources import ResourceVersion

logger = logging.getLogger(__name__)

RESUME_TRIES: Final = 10
RESUME_BACKOFF_SECONDS: Final = 0.1
NO_WEIGHTS: Final = 503
"""The answer to a label where there are no weights to put it on."""


@dataclass(frozen=True, slots=True)
class _Hashed:
    """What the server's weights hashed to after the last load that passed, and from where they came."""

    digest: str
    sha256: str
    folder: Path


class Weights:
    def __init__(self, server: PolicyServer, shared: Shared) -> None:
        self.loaded: Content | None = None
        self.good: ResourceVersion | None = None
        """The last version that this process loaded into the server without trouble."""
        self._server = server
        self._shared = shared
        self._transfer = Transfer(server.url, shared.settings) if shared.settings.load == "transfer" else None
        self._hashed: _Hashed | None = None
        self._whole = False
        """While it is paused: whether the server has all of some version's weights."""
        self._touched = False
        """Whether this load has begun, and was not refused: the server may not outlive what it has now."""
        self._loading: str | None = None
        """The label that this load gave it, or the one it had where it takes none."""
        self._alone = True
        """Whether nobody else was seen at it while it was paused."""
        self._held = False
        """Whether it was left paused, and that was said; the loop's own warnings say that it goes on."""
        self._warned = False

    def observe(self, state: State) -> None:
        """Forgets what was loaded when the server says something else: it was restarted, or somebody else was here."""
        if self._transfer and state.held:
            self._transfer.spoiled = True  # by whoever was at it before
        if self.loaded and state.version != self.loaded[0]:
            self.loaded = self._hashed = None
            self.forget()
            self._shared.digests.forget(self._server.url)

    def forget(self) -> None:
        """The server was started anew, or may have been: what was found out about it counts no more."""
        self._server.forget()
        if self._transfer:
            self._transfer.forget()

    async def close(self) -> None:
        if self._transfer:
            await self._transfer.close()

    async def check(self, folder: Path, layout: Layout) -> None:
        """The rest of step 1. Raises Unusable where its tensors are not those of the version before it, or its files
        are gone, StoreTrouble where they cannot be read now, Unreachable where they cannot be sent."""
        if sender := self._sender(layout):
            await sender.connect()
        before = self._shared.layout
        if before and (layout or not _has_weights(folder)):
            check_alike(layout, before)
        if not self._warned and is_tied(folder) and await self._server.on_cpu():
            self._warned = True
            logger.error(
                "%s is a vLLM on a CPU and the model's embeddings are tied: it keeps the old output layer when weights "
                "are loaded, and its logprobs are wrong from then on; export with tie_word_embeddings: false, or "
                "restart it for each version (docs/vllm.md)",
                self._server.url,
            )

    async def load(
        self,
        wanted: ResourceVersion,
        files: Verified,
        layout: Layout,
        state: State,
        clock: Phases,
        still_wanted: Callable[[], bool],
    ) -> bool:
        """Steps 2 to 8; whether it was still wanted when its turn came. Raises Unusable, Unreachable, Refused; from 4
        on LoadFailed where the server is gone, whatever it is asked for then."""
        with self._its_end_counts():
            async with self._shared.turns.turn() as turn:
                clock.end("turn")
                if not still_wanted() or not self._shared.lease.is_held:
                    return False
                await _to_its_end(self._update(wanted, files, layout, state, clock, turn))
            clock.end("resume")
            self._shared.layout = layout
            served = await self._server.state()  # 8
        if served.version != wanted.version:
            message = f"serves {served.label!r} after version {wanted.version} was loaded"
            raise (LoadFailed if served.is_nobodys else Unreachable)(message, answered=True)
        return True

    @contextlib.contextmanager
    def _its_end_counts(self) -> Generator[None]:
        """A server that is gone once its load has begun has failed it."""
        self._touched = False
        try:
            yield
        except LoadFailed:
            raise
        except Unreachable as error:
            if self._touched and not error.answered:
                raise LoadFailed(str(error), answered=False) from None
            raise

    async def _update(
        self, wanted: ResourceVersion, files: Verified, layout: Layout, state: State, clock: Phases, turn: Turn
    ) -> None:
        """Steps 2 to 7."""
        self._whole, self._alone = state.whole, True
        try:
            await self._server.pause()  # 2
            now = await self._server.state()
            if now.label != state.label or not now.paused:
                # Restarted, or somebody else was or is here, while files were fetched: nothing that was seen counts.
                self._whole, self._alone = now.whole and now.paused, now.paused
                raise Unreachable(
                    f"has {now.label!r}, paused: {now.paused}, and had {state.label!r} when its turn was asked for",
                    answered=True,
                )
            clock.end("pause")
            await self._swap(wanted, files, layout, state, clock)  # 3 to 6
        except Unreachable as error:
            if not error.answered:
                turn.give_back()
            elif isinstance(error, LoadFailed):
                await self._restore(wanted)  # 7
            raise
        finally:
            if self._whole:
                await self._resume(turn)  # 7
            elif self._alone and not self._held:
                self._held = True
                logger.error(
                    "%s STAYS PAUSED: what it has after loading version %d did not succeed is not known to be whole; "
                    "its requests wait until a version is loaded, which is tried for ever",
                    self._server.url,
                    wanted.version,
                )

    async def _swap(
        self, wanted: ResourceVersion, files: Verified, layout: Layout, state: State, clock: Phases
    ) -> None:
        if sender := self._sender(layout):
            sender.ensure_connected()  # while nothing is touched
        self._loading = await self._unlabel(state)  # 3
        loaded, self.loaded = self.loaded, None
        self._whole, self._touched = False, True
        try:
            await self._bring(files.folder, layout)  # 4
            await _ensure_unchanged(files)
        except Refused as error:
            # Refused means untouched: the weights are what they were.
            self._touched = False
            await self._ensure_alone()
            self._whole = state.whole
            if state.version is not None:
                await self._server.set_label(str(state.version))
            self.loaded = loaded
            raise Unusable(f"the server refused it: {error}") from None
        except LoadFailed:
            raise
        except Unreachable as error:
            raise LoadFailed(str(error), answered=error.answered) from None
        clock.end("load")
        if self._shared.settings.check_weights:
            await self._check(wanted, files.folder)  # 5
            clock.end("check")
        await self._label(wanted)  # 6

    async def _bring(self, folder: Path, layout: Layout) -> None:
        """4, by whichever way there is. Raises Refused where the server is untouched, else Unreachable."""
        if sender := self._sender(layout):
            await sender.send(folder)
        else:
            await self._server.reload_weights(str(folder))

    def _sender(self, layout: Layout) -> Transfer | None:
        """Where these tensors are sent, as far as is known; else the server reads files."""
        return self._transfer if self._transfer and layout and not self._transfer.absent else None

    async def _unlabel(self, state: State) -> str | None:
        """The label that it has now."""
        if state.label is None:
            return None
        label = f"{LABEL_LOADING}-{secrets.token_hex(8)}"
        try:
            await self._server.set_label(label)
        except Unreachable as error:
            if error.status != NO_WEIGHTS or state.version is not None:
                raise
            return state.label
        return label

    async def _ensure_alone(self) -> None:
        """Raises Unreachable where somebody else was at the server since it got this label: what it has is not known,
        and not ours to undo."""
        now = await self._server.state()
        if not now.paused or now.label != self._loading:
            self._alone = False
            raise Unreachable(
                f"has {now.label!r}, paused: {now.paused}, where it was paused as {self._loading!r} for a load: "
                "another follower or a person was here; nothing is labelled",
                answered=True,
            )

    async def _label(self, version: ResourceVersion) -> None:
        await self._ensure_alone()
        self._whole, self._held = True, False
        self.good = version
        self._shared.versions.give(version)
        await self._server.set_label(str(version.version))
        self.loaded = content(version)

    async def _check(self, wanted: ResourceVersion, folder: Path) -> None:
        digest = await self._digest()
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

    async def _digest(self) -> str | None:
        try:
            return await self._server.weights_digest()
        except Unreachable as error:
            raise LoadFailed(str(error), answered=error.answered) from None

    async def _restore(self, failed: ResourceVersion) -> None:
        """Loads the last good version over what is left of `failed`, or else the newest of the others that can be."""
        for version in self._others(failed):
            try:
                files = await self._shared.files.ready(version)
                layout = await asyncio.to_thread(read_layout, files.folder)
                if sender := self._sender(layout):
                    await sender.connect()
                await self._ensure_alone()
                await self._bring(files.folder, layout)
                await _ensure_unchanged(files)
                if self._shared.settings.check_weights:
                    await self._check(version, files.folder)
                await self._label(version)
            except (Unusable, StoreTrouble, Refused, Unreachable) as error:
                level = logging.DEBUG if self._held else logging.WARNING
                logger.log(level, "%s cannot be given version %d back: %s", self._server.url, version.version, error)
                if self._whole or not self._alone or (isinstance(error, Unreachable) and not error.answered):
                    return
            else:
                logger.warning(
                    "%s has version %d again, after a failed load of %d",
                    self._server.url,
                    version.version,
                    failed.version,
                )
                return

    def _others(self, failed: ResourceVersion) -> list[ResourceVersion]:
        known = [version for version in (self.good, *self._shared.versions.all()) if version is not None]
        others = {identity(version): version for version in known if version.kind == "weights"}
        others.pop(identity(failed), None)
        return list(others.values())

    async def _resume(self, turn: Turn) -> None:
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


def _has_weights(folder: Path) -> bool:
    """In any format."""
    try:
        return any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())
    except OSError as error:
        raise unreadable(f"{folder} cannot be read", error) from None


async def _ensure_unchanged(files: Verified) -> None:
    """Raises LoadFailed: what was loaded is not what was verified; LoadUncertain: that cannot be told."""
    try:
        await asyncio.to_thread(files.ensure_unchanged)
    except Unusable as error:
        raise LoadFailed(str(error), answered=True) from None
    except StoreTrouble as error:
        raise LoadUncertain(str(error), answered=True) from None


async def _to_its_end(update: Coroutine[None, None, None]) -> None:
    """A stop of this process waits for an update that has begun: nobody else would resume the server."""
    running = asyncio.ensure_future(update)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        with contextlib.suppress(FulguriteError):
            await running
        raise

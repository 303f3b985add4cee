"""One server brought to the newest version and kept there: the loop and the contract.

    newest version (log) ──┐
                           ├─► same? ── yes ─► nothing to do
    GET /weight_info ──────┘     └─ no ─► 1 verify ─► 2 pause ─► 3 unlabel ─► 4 load ─► 5 label ─► 6 resume ─► 7 compare
                                                                                                   8 report ◄───────┘
    consumes: resources; produces: training; waits for: the server; unblocked by: it always resumes, also on error

Same means: the server's label is the wanted number, and this process itself loaded that number and checksum into it. A
label alone says nothing of the files: the same number may have been announced again with others (a wiped log, a second
publisher). So a fresh follower loads the newest version once (25 to 100 ms paused) even where the label fits already.

The contract, and what a crash of this process after each step leaves for the next start, which remembers no load, so
begins with 1 again and finds out by itself:
1. Verify the files' checksum. Crash: nothing has happened.
2. POST /pause?mode=keep: requests under way freeze, the caches are cleared. Crash: the server stays paused until the
   next start, which goes on with 1, or resumes the server if there is nothing to load.
3. Label the weights "loading", if they have a version: until 5 nobody can take them for one. Crash: paused without a
   version, so the newest one is loaded.
4. POST /collective_rpc reload_weights. Crash: as after 3, loaded again.
5. Label them with the version, and remember number and checksum. Crash: paused with the right version; loaded again.
6. POST /resume, in `finally`, tried again until it works or the server is gone. Crash: as 5, but not paused.
7. Ask which version is served. Not the wanted one: begin again.
8. Publish VersionApplied and wait for the acknowledgement. Crash before or after: the next start loads the version
   again and publishes it; so at least once for every change, and a duplicate says the same.

An unusable version (files not as announced, refused by the server) is refused loudly, reported with ok=False and not
tried again while this process lives; what the server has goes on, and if it has nothing, the newest usable version is
loaded. Everything that may pass is tried for ever. A server that restarts is noticed within follower.check_seconds by
its label; one that came back with the label it had before would not be (servers start without a number, or with none
of ours). One follower a server: two would resume each other's pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from fulgurite.consumers.follower.server import PolicyServer, Refused, State, Unreachable
from fulgurite.consumers.follower.versions import Content, Identity, Verifier, Versions, content, identity
from fulgurite.schemas.errors import ChecksumMismatch
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.training import VersionApplied

logger = logging.getLogger(__name__)

LABEL_LOADING: Final = "loading"
"""Not a decimal number: what is sampled under it has no known version."""
LOAD_TRIES: Final = 3
"""A server that is there and fails this often to load a version is taken at its word."""
RESUME_TRIES: Final = 10
RESUME_BACKOFF_SECONDS: Final = 0.1
MAX_BACKOFF_SECONDS: Final = 5.0
LOG_EVERY_SECONDS: Final = 5.0

Report = Callable[[VersionApplied], Awaitable[None]]
"""Publishes; returns when the broker has it."""


class _Unusable(Exception):
    """This version cannot be served; another one can."""


class Convergence:
    """One server's loop. `run` ends only by cancellation, and never leaves the server paused if it can help it."""

    def __init__(
        self, server: PolicyServer, versions: Versions, verifier: Verifier, report: Report, check_seconds: float
    ) -> None:
        self._server = server
        self._versions = versions
        self._verifier = verifier
        self._report = report
        self._check_seconds = check_seconds
        self._refused: set[Identity] = set()
        self._failures: dict[Identity, int] = {}
        self._reported: Identity | None = None
        self._loaded: Content | None = None
        """What this process loaded and labelled last, None while it cannot know."""
        self._changed = versions.subscribe()
        self._logged_at = -LOG_EVERY_SECONDS

    async def run(self) -> None:
        failures = 0
        while True:
            self._changed.clear()  # before the comparison: what arrives during it is compared next
            try:
                await self.step()
                failures = 0
                pause = self._check_seconds
            except (Unreachable, Refused) as error:
                failures += 1
                pause = min(self._check_seconds, 0.1 * 2 ** min(failures, 6), MAX_BACKOFF_SECONDS)
                self._log_trouble(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def step(self) -> None:
        """One comparison and what follows from it. Raises Unreachable, or Refused by a route other than the load."""
        state = await self._server.state()
        if self._loaded and state.version != self._loaded[0]:
            self._loaded = None  # restarted, or somebody else was here
        wanted = self._versions.wanted(self._refused)
        served = wanted is not None and self._loaded == content(wanted)
        if wanted is None or served or self._keeps_newer(wanted, state):
            if state.paused:
                logger.warning("%s was left paused; resuming it", self._server.url)
                await self._server.resume()
            if wanted and served and self._reported != identity(wanted):
                logger.info("%s serves %s version %d", self._server.url, wanted.resource, wanted.version)
                await self._applied(wanted, {})
            return
        try:
            seconds = await self._apply(wanted, state)
        except _Unusable as error:
            await self._refuse(wanted, str(error))
            return
        logger.info(
            "%s serves %s version %d after %.3f s (paused %.3f s)",
            self._server.url,
            wanted.resource,
            wanted.version,
            seconds["total"],
            seconds["pause"] + seconds["load"] + seconds["resume"],
        )
        await self._applied(wanted, seconds)  # 8

    async def _apply(self, wanted: ResourceVersion, state: State) -> dict[str, float]:
        """Steps 1 to 7; the duration of each phase. Raises _Unusable, Unreachable, Refused."""
        clock = _Phases()
        try:
            folder = await self._verifier.verify(wanted)  # 1
        except ChecksumMismatch as error:
            raise _Unusable(str(error)) from None
        clock.end("verify")
        try:
            await self._server.pause()  # 2
            clock.end("pause")
            await self._load(wanted, str(folder), state)  # 3, 4, 5
            clock.end("load")
        finally:
            await self._resume()  # 6
        clock.end("resume")
        served = await self._server.state()  # 7
        if served.version != wanted.version:
            raise Unreachable(f"serves {served.label!r} after version {wanted.version} was loaded", answered=True)
        self._failures.pop(identity(wanted), None)
        return clock.seconds()

    async def _load(self, wanted: ResourceVersion, folder: str, state: State) -> None:
        if state.version is not None:  # else the label names no version, or there are no weights to label
            await self._server.set_label(LABEL_LOADING)  # 3
        loaded, self._loaded = self._loaded, None
        try:
            await self._server.reload_weights(folder)  # 4
        except Refused as error:
            # Refused means untouched: the weights are what they were.
            if state.version is not None:
                await self._server.set_label(str(state.version))
            self._loaded = loaded
            raise _Unusable(f"the server refused it: {error}") from None
        except Unreachable as error:
            key = identity(wanted)
            self._failures[key] = self._failures.get(key, 0) + error.answered
            if self._failures[key] >= LOAD_TRIES:
                raise _Unusable(f"the server failed to load it {LOAD_TRIES} times: {error}") from None
            raise
        await self._server.set_label(str(wanted.version))  # 5
        self._loaded = content(wanted)

    async def _resume(self) -> None:
        """Step 6. Shielded: a stop of this process waits for it."""
        resuming = asyncio.ensure_future(self._resume_until_done())
        try:
            await asyncio.shield(resuming)
        except asyncio.CancelledError:
            with contextlib.suppress(Unreachable, Refused):
                await resuming
            raise

    async def _resume_until_done(self) -> None:
        for tries in range(1, RESUME_TRIES + 1):
            try:
                await self._server.resume()
            except (Unreachable, Refused):
                if tries == RESUME_TRIES:
                    raise  # gone, or restarted; the next comparison finds out
                await asyncio.sleep(RESUME_BACKOFF_SECONDS)
            else:
                return

    def _keeps_newer(self, wanted: ResourceVersion, state: State) -> bool:
        """Whether `wanted` is only what is left after a refusal, and the server has something newer: it keeps that."""
        newest = self._versions.newest
        assert newest is not None
        return newest.version != wanted.version and state.version is not None and state.version > wanted.version

    async def _refuse(self, version: ResourceVersion, error: str) -> None:
        self._changed.set()  # compare again at once: something else may be wanted now, or the server still be paused
        newest = self._versions.newest
        if newest and newest.version > version.version and identity(newest) not in self._refused:
            # Its files may be gone because newer ones came: nothing is wrong.
            logger.info("%s skips version %d: %s", self._server.url, version.version, error)
            return
        self._refused = {known for known in self._refused if known in self._versions} | {identity(version)}
        self._failures.pop(identity(version), None)
        logger.error(
            "%s REFUSED %s version %d, keeps what it serves: %s",
            self._server.url,
            version.resource,
            version.version,
            error,
        )
        await self._report(self._event(version, {}, error=error))

    async def _applied(self, version: ResourceVersion, seconds: dict[str, float]) -> None:
        await self._report(self._event(version, seconds))
        self._reported = identity(version)

    def _event(self, version: ResourceVersion, seconds: dict[str, float], error: str = "") -> VersionApplied:
        return VersionApplied(
            run_id=version.run_id or version.resource,
            resource=version.resource,
            version=version.version,
            server=self._server.url,
            ok=not error,
            error=error[:4_000],
            seconds=seconds,
        )

    def _log_trouble(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_SECONDS:
            self._logged_at = now
            logger.warning("%s: %s; trying again", self._server.url, error)


class _Phases:
    """Durations of the phases of one update."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[phase] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._seconds | {"total": time.monotonic() - self._began}

"""One server brought to the newest version and kept there: the loop and the contract.

    newest version (log) ──┐
                           ├─► same? ── yes ─► nothing to do
    GET /weight_info ──────┘     └─ no ─► 1 verify ─► 2 pause ─► 3 unlabel ─► 4 load ─► 5 hash ─► 6 label ─► 7 resume
                                                                         9 report ◄─── 8 compare ◄──────────────┘
    consumes: resources; produces: training; waits for: the server, its turn, an object store; unblocked by: it always
    resumes, also on error, and a server that does not answer loses its turn

Same means: the server's label is the wanted number, and this process itself loaded that number and checksum into it. A
label alone says nothing of the files: the number may have meant others once (a wiped log). So a fresh follower loads
the newest version once (25 to 100 ms paused) even where the label fits already.

The contract, and what a crash of this process after each step leaves for the next start, which remembers no load, so
begins with 1 again and finds out by itself:
1. Fetch the files where that is needed, verify their checksum; read the headers of safetensors: they must be whole, and
   have the tensors of the version loaded last (`layout.py`). Crash: nothing has happened; what was fetched is kept.
2. When it is this server's turn, POST /pause?mode=keep: requests under way freeze, the caches are cleared. Ask for its
   label once more: another one than before 1 means that it was restarted meanwhile; then 7, and begin again. Crash: the
   server stays paused until the next start, which goes on with 1, or resumes the server if there is nothing to load.
3. Label the weights "loading-", and a random part: until 6 nobody can take them for a version, nor for whole, and
   everybody can tell this load from another. A paused server with such a label is never resumed, by whichever start,
   before a version was loaded into it. Crash: so it is with the newest.
4. POST /collective_rpc reload_weights, or send the tensors (`transfer.py`); then look whether the files are still those
   of 1: a folder that is loaded from where it lies may have been written to meanwhile. Crash: as after 3, loaded again.
5. POST /weight_checker, where there is one: do the weights hash to what they ought to (`digests.py`)? While it is
   paused, because hashing stops the engine anyway, and wrong weights get no label and no request. Crash: as after 4.
6. Ask whether it is still paused, with the label of 3. If not, somebody else was here (a follower that had lost its
   right to act, or an operator): give no label, resume nothing, begin again. Else label the weights with the version,
   and remember number and checksum. Crash: paused with the right version; loaded again.
7. POST /resume, in `finally`, tried again until it works or the server is gone. Crash: as 6, but not paused.
   Not if 4 or 5 failed: what the server has then may be half of two versions, or nothing; vLLM would die of the first
   request. So before: the version that was served is loaded again, else the newest other one whose files are usable,
   checked and labelled as in 4 to 6, then resumed. Crash: as after 3. If none can be loaded, or the server does not
   answer, it stays paused: requests wait, within the gateway's bound, rather than get nonsense that would be recorded
   as a version's. This is logged as an error, /ready and a metric say so, and loading goes on for ever: what is wanted,
   and when all was refused, every known version in turn. A server that restarts meanwhile ends it as well.
   A stop of this process waits for 2 to 7 to end, as long as it may; killed within them it is a crash.
8. Ask which version is served. Not the wanted one: begin again. A server that is gone between 4 and here, or was
   started anew, has failed to load it.
9. Report VersionApplied: `reports.py` publishes it, for ever, while the next comparison goes on. Crash before or after:
   the next start loads the version again and reports it; so at least once for every change, and a duplicate says the
   same.

A version of kind `lora` has 1, then is loaded beside what is served, looked for among the served models, and reported:
nothing is paused (`adapters.py`). Files of one that the server lists no more are claimed until no request can be on it
(`draining.py`), over crashes and restarts: claims are written down before a load, and none goes by being forgotten.

An unusable version is refused loudly, reported with ok=False and not tried again while this process lives; what the
server has goes on, and if it has nothing, the newest usable version is loaded. Unusable are files not as announced,
what the server refused, and what failed LOAD_TRIES times, also because the server did not answer or outlive it; and
what it lost again as often by a restart within OUTLIVE_SECONDS (`tries.py`).
Everything that may pass is tried for ever, an error of a disk too, unless it is that files are not there. A server that
restarts is noticed within follower.check_seconds by its label; one that came back with the label it had before would
not be (servers start without a number, or with none of ours).

One follower acts on a server: two would resume each other's pauses. Which one Kafka says (`owner.py`): 1 begins, a
server is paused and one left paused is resumed only while the lease runs; without a broker nothing is begun. A load
that outlives the lease is what the label of 3 and the question of 6 are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from fulgurite.consumers.follower.adapters import Adapters
from fulgurite.consumers.follower.layout import read_layout
from fulgurite.consumers.follower.loading import LoadFailed, Phases, Shared
from fulgurite.consumers.follower.server import PolicyServer, Refused, State, Unreachable
from fulgurite.consumers.follower.store import StoreTrouble, Unusable
from fulgurite.consumers.follower.tries import LOAD_TRIES, Tries
from fulgurite.consumers.follower.versions import Identity, content, identity
from fulgurite.consumers.follower.weights import Weights
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.training import VersionApplied

logger = logging.getLogger(__name__)

OUTLIVE_SECONDS: Final = 10.0
"""Beside the time between comparisons: a server that ends so soon after a load may have ended of what it got."""
MAX_BACKOFF_SECONDS: Final = 5.0
LOG_EVERY_SECONDS: Final = 5.0

Report = Callable[[VersionApplied], Awaitable[None]]
"""Takes what is to be published; must not wait for a broker."""


class Convergence:
    """One server's loop. `run` ends only by cancellation; the server stays paused only where it has nothing whole."""

    def __init__(self, server: PolicyServer, shared: Shared, report: Report) -> None:
        self._server = server
        self._shared = shared
        self._versions = shared.versions
        self._files = shared.files
        self._metrics = shared.metrics
        self._report = report
        self._weights = Weights(server, shared)
        self._adapters = Adapters(server, shared)
        self._refused: set[Identity] = set()
        self._tries = Tries(OUTLIVE_SECONDS + shared.settings.check_seconds)
        self._reported: Identity | None = None
        self._rescues = 0
        self._changed = shared.versions.subscribe()
        self._logged_at = -LOG_EVERY_SECONDS
        self._metrics.follows(server.url)

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            await self._weights.close()
            self._versions.unsubscribe(self._changed)
            self._metrics.leaves(self._server.url)

    async def _run(self) -> None:
        failures = 0
        while True:
            await self._shared.lease.held()
            self._changed.clear()  # before the comparison: what arrives during it is compared next
            try:
                await self.step()
                failures = 0
                pause = self._shared.settings.check_seconds
            except (Unreachable, Refused, StoreTrouble) as error:
                if isinstance(error, Unreachable) and not error.answered:
                    self._weights.forget()
                    self._tries.away()
                failures += 1
                pause = min(self._shared.settings.check_seconds, 0.1 * 2 ** min(failures, 6), MAX_BACKOFF_SECONDS)
                self._metrics.trouble(self._server.url)
                self._log_trouble(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def step(self) -> None:
        """One comparison and what follows from it. Raises Unreachable, StoreTrouble, or Refused by a route other than
        the load."""
        wanted = self._versions.wanted(self._refused)
        state = await self._observe(wanted)
        served = wanted is not None and self._serves(wanted)
        self._tries.observed(identity(wanted) if wanted else None, served=served, restarted=state.is_nobodys)
        self._observed(state, wanted, served=served)
        if state.held and (wanted is None or wanted.kind != "weights"):
            await self._rescue(state)
            return
        if wanted is None or served or self._keeps_newer(wanted, state):
            if state.paused:
                await self._resume()
            if wanted and served and self._reported != identity(wanted):
                logger.info("%s serves %s version %d", self._server.url, wanted.resource, wanted.version)
                await self._applied(wanted, {})
            if self._adapters.draining.over:
                await self._collect()
            return
        if state.paused and state.version is not None:
            # By somebody who was killed; fetching the wanted version may take long, or not be possible now. Weights
            # without a number may be what a failed load left.
            await self._resume()
        try:
            seconds = await self._apply(wanted, state, lambda: self._still(wanted))
        except Unusable as error:
            await self._refuse(wanted, str(error))
            return
        if seconds:
            await self._done(wanted, state, seconds)

    async def _resume(self) -> None:
        """Raises Unreachable where another follower may be the one that has paused it."""
        if not self._shared.lease.is_held:
            raise Unreachable("is paused, perhaps by another follower", answered=True)
        logger.warning("%s was left paused; resuming it", self._server.url)
        await self._server.resume()

    async def _rescue(self, state: State) -> None:
        """The server holds nothing whole, and what is wanted is not what could help: each try another of the known
        versions. They were refused, but a server or a disk may do today what it did not yesterday."""
        known = [version for version in self._versions.all() if version.kind == "weights"]
        if not known:
            raise Unreachable("is paused without whole weights, and no version is known", answered=True)
        version = known[self._rescues % len(known)]
        self._rescues += 1
        try:
            seconds = await self._apply(version, state, lambda: True)
        except Unusable as error:
            raise Unreachable(f"is paused without whole weights: {error}", answered=True) from None
        if seconds:
            self._refused.discard(identity(version))
            await self._done(version, state, seconds)

    async def _done(self, version: ResourceVersion, state: State, seconds: dict[str, float]) -> None:
        self._log_served(version, seconds)
        self._metrics.applied(self._server.url, seconds)
        self._metrics.holds(self._server.url, nothing=False)
        self._observed(state, version, served=True)
        await self._applied(version, seconds)  # 9
        await self._collect()

    async def _observe(self, wanted: ResourceVersion | None) -> State:
        """What the server says of itself."""
        if wanted is None or wanted.kind != "lora":
            state = await self._server.state()
        else:
            try:
                state = await self._server.state()
            except Refused:  # vLLM without VLLM_SERVER_DEV_MODE=1, which adapters do not need
                state = State(label=None, paused=False)
            await self._adapters.observe()
        await self._adapters.draining.look(paused=state.paused)
        self._weights.observe(state)
        self._metrics.holds(self._server.url, nothing=state.held)
        return state

    def _observed(self, state: State, wanted: ResourceVersion | None, *, served: bool) -> None:
        """Tells the cache and the metrics what the server has; `served` is whether that is what is wanted."""
        current = wanted if served else None
        versions = set(self._adapters.versions)
        if current is not None:
            versions.add(current.version)
        elif state.version is not None:
            versions.add(state.version)
        elif self._weights.good is not None:
            versions.add(self._weights.good.version)  # it may be needed again
        self._files.cache.claim(self._server.url, versions, self._done_with(wanted))
        version = current.version if current else state.version if state.version is not None else self._newest_adapter()
        self._metrics.observed(self._server.url, version, current)

    def _done_with(self, wanted: ResourceVersion | None) -> set[int]:
        """What the server needs no more, if it does not have it. Weights it reads only while it loads them."""
        if wanted is None:
            return set()
        if wanted.kind == "lora":
            return self._adapters.draining.over
        return self._files.cache.claimed(self._server.url) - self._adapters.draining.kept

    def _newest_adapter(self) -> int | None:
        return max(self._adapters.versions, default=None)

    def _serves(self, wanted: ResourceVersion) -> bool:
        return self._adapters.serves(wanted) if wanted.kind == "lora" else self._weights.loaded == content(wanted)

    async def _apply(self, wanted: ResourceVersion, state: State, still_wanted: Callable[[], bool]) -> dict[str, float]:
        """Steps 1 to 8; the duration of each phase, none where another version was wanted when it was this server's
        turn. Raises Unusable, Unreachable, Refused, StoreTrouble."""
        if self._tries.is_deadly(identity(wanted)):
            raise Unusable(f"the server was started anew {LOAD_TRIES} times just after it had loaded it")
        clock = Phases()
        good = self._weights.good.version if self._weights.good else None
        has = {number for number in (state.version, good) if number is not None} | self._adapters.versions
        self._files.cache.claim(self._server.url, has | {wanted.version})
        files = await self._files.ready(wanted)  # 1
        layout = await asyncio.to_thread(read_layout, files.folder)
        if wanted.kind != "lora":
            await self._weights.check(files.folder, layout)
        clock.end("verify")
        try:
            if wanted.kind == "lora":
                await self._adapters.load(wanted, files.folder, clock)
            elif not await self._weights.load(wanted, files, layout, state, clock, still_wanted):
                return {}
        except LoadFailed as error:
            if wanted.kind != "lora":
                self._reported = None  # the server had something else meanwhile, whatever it has now
            if not error.answered:
                self._weights.forget()
            # A server that is away is not loaded into: this one was there, and the load may be what ended it.
            if self._tries.failed(identity(wanted), counts=error.counts):
                raise Unusable(f"the server failed to load it {LOAD_TRIES} times: {error}") from None
            raise
        self._tries.loaded(identity(wanted))
        return clock.seconds() | {"published": max(0.0, time.time() - wanted.time_ns / 1e9)}

    def _still(self, wanted: ResourceVersion) -> bool:
        newest = self._versions.wanted(self._refused)
        return newest is not None and identity(newest) == identity(wanted)

    async def _collect(self) -> None:
        if gone := await self._files.collect():
            logger.info("removed versions %s from the cache", ", ".join(map(str, gone)))

    def _keeps_newer(self, wanted: ResourceVersion, state: State) -> bool:
        """Whether `wanted` is only what is left after a refusal, and the server has something newer: it keeps that."""
        newest = self._versions.newest
        assert newest is not None
        has = self._newest_adapter() if wanted.kind == "lora" else state.version
        return newest.version != wanted.version and has is not None and has > wanted.version

    async def _refuse(self, version: ResourceVersion, error: str) -> None:
        self._changed.set()  # compare again at once: something else may be wanted now, or the server still be paused
        newest = self._versions.newest
        if newest and newest.version > version.version and identity(newest) not in self._refused:
            # Its files may be gone because newer ones came: nothing is wrong.
            logger.info("%s skips version %d: %s", self._server.url, version.version, error)
            return
        self._refused = {known for known in self._refused if known in self._versions} | {identity(version)}
        self._tries.forget(identity(version))
        logger.error(
            "%s REFUSED %s version %d, keeps what it serves: %s",
            self._server.url,
            version.resource,
            version.version,
            error,
        )
        self._metrics.refused(self._server.url)
        await self._report(self._event(version, {}, error=error))

    async def _applied(self, version: ResourceVersion, seconds: dict[str, float]) -> None:
        await self._report(self._event(version, seconds))
        self._reported = identity(version)

    def _log_served(self, version: ResourceVersion, seconds: dict[str, float]) -> None:
        paused = sum(seconds[phase] for phase in ("pause", "load", "check", "resume") if phase in seconds)
        logger.info(
            "%s serves %s version %d after %.3f s (%s)",
            self._server.url,
            version.resource,
            version.version,
            seconds["total"],
            f"paused {paused:.3f} s" if "pause" in seconds else "nothing was paused",
        )

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

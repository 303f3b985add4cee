"""Whether requests may still be under way on adapters that are no more on a server's list: their files stay until then.

vLLM reads an adapter's files again whenever another one took its place in memory (with its default of one place, at
every load), also for requests that began before it was unloaded. Where the files are gone then, the whole engine ends.
So they stay until the server itself was seen to be through with it. What vLLM says of this on /metrics:

    vllm:lora_requests_info{running_lora_adapters="…",waiting_lora_adapters="…"} <time>   the newest sample counts
    vllm:num_requests_waiting                                                             whichever model they ask for

Both are of the last step of the engine. A request is named from its first token on; one that came before the unloading
and waits for its turn since is only counted. Hence the rule, in this order:
1. QUIET_SECONDS after it left the list: what was accepted before has come to the engine, and was counted in a step.
2. A look at which nothing waits: all of that has begun.
3. QUIET_SECONDS without a look that names it: by then a prompt that was being read has had its first token.
Where it does not tell for a while, all begins with 1 again, and so it does, as if it had just left, with every look at
a server that is paused.

Where it never tells (`--disable-log-stats`), or its queue is never seen empty, `follower.drain_seconds` are the bound:
nobody waits that long for an answer. One that is named stays for as long as it is.

Remembers nothing over a restart of the follower: what is claimed and not on the list begins with 1. Knows no files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from fulgurite.consumers.follower.server import PolicyServer, Refused, Unreachable
from fulgurite.schemas.resources import adapter_name
from fulgurite.schemas.settings import FollowerSettings

logger = logging.getLogger(__name__)

QUIET_SECONDS: Final = 60.0
"""Longer than a request takes from its arrival to the engine, and from its turn to its first token."""
LOOKS: Final = 12
"""In QUIET_SECONDS: reading metrics keeps vLLM from other work for some milliseconds."""
ANSWER_SECONDS: Final = 5.0
"""Longest that a look may keep the server's loop from its versions."""
_ADAPTERS: Final = "vllm:lora_requests_info"
_WAITING: Final = "vllm:num_requests_waiting"


@dataclass(frozen=True, slots=True)
class Requests:
    """What a server had under way at its last step."""

    adapters: frozenset[str]
    """Named by requests that have begun."""
    waiting: float


@dataclass(slots=True)
class _Left:
    """One version that left the list; times of the monotonic clock."""

    at: float
    settling_since: float
    none_waited_at: float | None = None
    named_at: float | None = None
    over: bool = False

    def unknown(self, now: float) -> None:
        self.settling_since, self.none_waited_at = now, None

    def seen(self, requests: Requests, name: str, now: float) -> None:
        if name in requests.adapters:
            self.named_at = now
        if self.none_waited_at is None and not requests.waiting and _quiet(self.settling_since, now):
            self.none_waited_at = now

    def is_over(self, now: float, drain_seconds: float) -> bool:
        if self.named_at is not None and not _quiet(self.named_at, now):
            return False
        through = self.none_waited_at is not None and _quiet(self.none_waited_at, now)
        return through or now - self.at >= drain_seconds


def _quiet(since: float, now: float) -> bool:
    return now - since >= QUIET_SECONDS


class Draining:
    """Of one server."""

    def __init__(
        self, server: PolicyServer, settings: FollowerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._settings = settings
        self._clock = clock
        self._left: dict[int, _Left] = {}
        self._next_look_at = 0.0
        self._warned = False

    @property
    def kept(self) -> set[int]:
        """Versions on which requests may be under way."""
        return {version for version, left in self._left.items() if not left.over}

    @property
    def over(self) -> set[int]:
        """Those that have none any more, as of the last look."""
        return {version for version, left in self._left.items() if left.over}

    def follow(self, versions: Iterable[int]) -> None:
        """All that the server may have and does not list. One that was over and is among them begins anew."""
        now = self._clock()
        known = {version: left for version, left in self._left.items() if not left.over}
        self._left = {version: known.get(version) or _Left(at=now, settling_since=now) for version in versions}

    async def look(self, *, paused: bool) -> None:
        now = self._clock()
        if paused:
            self._left = {version: _Left(at=now, settling_since=now) for version in self._left}
            return
        if not self._left or now < self._next_look_at:
            return
        self._next_look_at = now + QUIET_SECONDS / LOOKS
        requests = await self._requests()
        now = self._clock()
        for version, left in self._left.items():
            if requests:
                left.seen(requests, adapter_name(self._settings.resource, version), now)
            else:
                left.unknown(now)
            left.over = left.over or left.is_over(now, self._settings.drain_seconds)

    async def _requests(self) -> Requests | None:
        """None where the server does not tell."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                found = requests_in(await self._server.metrics())
        except (Refused, Unreachable, TimeoutError):
            found = None
        if found is None and not self._warned:
            self._warned = True
            logger.warning(
                "%s does not tell which adapters have requests (%s): files of unloaded ones stay for %g s",
                self._server.url,
                _ADAPTERS,
                self._settings.drain_seconds,
            )
        return found


def requests_in(metrics: str) -> Requests | None:
    """None where they do not say it."""
    about = [line for line in metrics.splitlines() if _ADAPTERS in line or _WAITING in line]
    try:
        families = {family.name: family.samples for family in text_string_to_metric_families("\n".join(about) + "\n")}
    except (ValueError, LookupError):
        return None
    if _ADAPTERS not in families or _WAITING not in families:
        return None
    newest = max(families[_ADAPTERS], key=lambda sample: sample.value, default=None)
    named = [newest.labels.get(f"{state}_lora_adapters", "") for state in ("running", "waiting")] if newest else []
    waiting = sum(sample.value for sample in families[_WAITING])
    return Requests(frozenset(",".join(named).split(",")) - {""}, waiting)

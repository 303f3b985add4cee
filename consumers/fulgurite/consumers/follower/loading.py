"""What the ways to bring a version into a server have in common: an error, a clock, and what all loops share."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import ClassVar

from fulgurite.consumers.follower.digests import Digests
from fulgurite.consumers.follower.files import Files
from fulgurite.consumers.follower.layout import Layout
from fulgurite.consumers.follower.metrics import Metrics
from fulgurite.consumers.follower.owner import Lease
from fulgurite.consumers.follower.server import Unreachable
from fulgurite.consumers.follower.turns import Turns
from fulgurite.consumers.follower.versions import Versions
from fulgurite.schemas.settings import FollowerSettings


class LoadFailed(Unreachable):
    """The server did not get the version, whether it answered or not: it may be asked again a few times. What it has
    instead is not known."""

    counts: ClassVar[bool] = True
    """Whether it speaks against the version."""


class LoadUncertain(LoadFailed):
    """Whether it got the version cannot be told: its files cannot be read now."""

    counts: ClassVar[bool] = False


class Phases:
    """Durations of the phases of one update, in seconds."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[phase] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._seconds | {"total": time.monotonic() - self._began}


@dataclass
class Shared:
    """What the loops of all servers share."""

    settings: FollowerSettings
    versions: Versions = field(default_factory=Versions)
    digests: Digests = field(default_factory=Digests)
    layout: Layout = field(default_factory=dict[str, tuple[int, ...]])
    """Of the weights that were loaded last without trouble, into whichever server; empty where that is not known."""
    lease: Lease = field(default_factory=lambda: Lease(math.inf))
    """Whether servers may be touched now; for ever where nobody else follows."""
    files: Files = field(init=False)
    turns: Turns = field(init=False)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.files = Files(self.settings)
        self.turns = Turns(self.settings.rollout_policy)
        self.metrics = Metrics(self.versions)

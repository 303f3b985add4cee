"""Which version a server's weights have, asked as seldom as that allows: GET /weight_info around calls.

For servers that do not say in their answers which version sampled. Versions only grow, and a number never means other
weights (the follower sees to both), so the same label at any time before a call and at any time after it means that
this version sampled all of it. Hence:
- before: what was seen last will do; if it is old it is asked for again, since an old label bounds less;
- after: the question must leave after the answer came; one question serves all calls that wait for it.

The same label says whether the weights have a version at all: a server that starts has its own (UNNUMBERED), until the
follower gives it one. So health checks ask for it too, and whoever may have another server before him (replica.py).

Whoever labels servers by hand may go from one version to another and back. A call that was under way then has no
version if any call's question saw the one in between; with nobody asking, it is not seen.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

FRESH_SECONDS: Final = 0.05
"""A call that began so soon after a swap may go without a version; older labels are asked for again."""
ABSENT_SECONDS: Final = 30.0
"""A server without the route is asked again after this: it may have been replaced."""


UNNUMBERED: Final = "default"
"""What vLLM and the embedded server call the weights that they started with."""
_VERSION: Final = re.compile(r"[0-9]{1,18}")


def is_version(label: str) -> bool:
    """Whether somebody numbered the weights that are called so."""
    return _VERSION.fullmatch(label) is not None


class NoSuchRoute(Exception):
    """The server does not have it."""


@dataclass(slots=True, frozen=True)
class Seen:
    """A label, and how many others had been seen before it."""

    label: str | None
    changes: int


class Labels:
    """Of one server. `read` gives the label, None when it cannot be had now; raises NoSuchRoute. `changed` is told when
    `numbered` or `unnumbered` did."""

    def __init__(self, read: Callable[[], Awaitable[str | None]], changed: Callable[[], None]) -> None:
        self._read = read
        self._changed = changed
        self.numbered = False
        """Whether its weights ever had a version."""
        self.unnumbered = False
        """Whether they have none now, and it says so."""
        self._label: str | None = None
        self._last: str | None = None
        self._changes = 0
        self._seen_at = -FRESH_SECONDS
        self._absent_until = 0.0
        self._asking: asyncio.Task[Seen] | None = None
        self._next: asyncio.Task[Seen] | None = None

    async def before(self) -> Seen:
        """A label the server had at some time before now."""
        if asyncio.get_running_loop().time() - self._seen_at < FRESH_SECONDS:
            return Seen(self._label, self._changes)
        if self._asking and not self._asking.done():
            return await asyncio.shield(self._asking)  # it is answered before the call is asked
        return await self._now()

    async def now(self) -> Seen:
        """A label the server has at some time after now."""
        return await self._now()

    async def after(self, before: Seen | None) -> str | None:
        """A label the server has at some time after now; None where it is that of `before`, but another one was seen
        in between."""
        now = await self._now()
        went_and_came = before is not None and before.label == now.label and before.changes != now.changes
        return None if went_and_came else now.label

    async def _now(self) -> Seen:
        loop = asyncio.get_running_loop()
        if loop.time() < self._absent_until:
            return Seen(None, self._changes)
        if self._next is None:
            # What is being asked left too early for us. The task begins only once we wait, and so after now.
            self._next = loop.create_task(self._ask_after(self._asking))
        return await asyncio.shield(self._next)

    def close(self) -> None:
        for task in (self._asking, self._next):
            if task:
                task.cancel()

    async def _ask_after(self, earlier: asyncio.Task[Seen] | None) -> Seen:
        if earlier is not None:
            await asyncio.wait({earlier})
        self._asking, self._next = self._next, None
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        try:
            self._label = await self._read()
        except NoSuchRoute:
            self._label, self._absent_until = None, loop.time() + ABSENT_SECONDS
            self._tell(None)
        if self._label is not None and self._label != self._last:
            self._last = self._label
            self._changes += 1
        if self._label is not None:
            self._tell(self._label)
        # Of the time it was asked: it is at least so old.
        self._seen_at = asked_at
        return Seen(self._label, self._changes)

    def _tell(self, label: str | None) -> None:
        """None: it does not say."""
        before = (self.numbered, self.unnumbered)
        self.numbered = self.numbered or (label is not None and is_version(label))
        self.unnumbered = label == UNNUMBERED
        if before != (self.numbered, self.unnumbered):
            self._changed()

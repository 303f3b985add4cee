"""The queue of rollouts that wait for a worker: retries first, then by the time they were queued.

Retries go to the front because a group of rollouts is worth nothing until its last member has ended: behind a long
queue a retried one would starve its group. The order depends on the entries alone, never on the order they were put
in, so that a replay which reads partitions in another order gives the same queue.

Taking an entry only sets it aside: it stays queued until `discard`, and `put_back` offers it again when the attempt did
not come to be.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Ticket = tuple[int, int, str]
"""0 for a retry, 1 for a first try; the time it was first queued; rollout_id, so that equal times have an order."""

_COMPACT_MIN_ENTRIES = 1_024
"""Entries that are no longer queued leave the heap when they come up, or all at once when they are the majority."""


class WorkQueue:
    def __init__(self) -> None:
        self._tickets: dict[str, Ticket] = {}
        self._heap: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, rollout_id: str, queued_ns: int, *, retry: bool) -> None:
        ticket = (0 if retry else 1, queued_ns, rollout_id)
        self._tickets[rollout_id] = ticket
        heapq.heappush(self._heap, ticket)

    def discard(self, rollout_id: str) -> None:
        self._tickets.pop(rollout_id, None)
        if len(self._heap) > 2 * len(self._tickets) + _COMPACT_MIN_ENTRIES:
            self._heap = [ticket for ticket in self._heap if self._tickets.get(ticket[2]) == ticket]
            heapq.heapify(self._heap)

    def take(self, limit: int, busy: Callable[[str], bool]) -> list[str]:
        """The next rollouts, at most `limit`, passing over busy ones, which keep their place."""
        taken: list[str] = []
        passed: list[Ticket] = []
        while self._heap and len(taken) < limit:
            ticket = heapq.heappop(self._heap)
            if self._tickets.get(ticket[2]) != ticket:
                continue
            if busy(ticket[2]):
                passed.append(ticket)
            else:
                taken.append(ticket[2])
        for ticket in passed:
            heapq.heappush(self._heap, ticket)
        return taken

    def put_back(self, rollout_id: str) -> None:
        """Offers a taken rollout again, if it is still queued."""
        ticket = self._tickets.get(rollout_id)
        if ticket is not None:
            heapq.heappush(self._heap, ticket)

    def order(self) -> list[str]:
        """All of them as they would be taken."""
        return [rollout_id for _, _, rollout_id in sorted(self._tickets.values())]

    def oldest_ns(self) -> int | None:
        """When the longest waiting one was queued."""
        return min((queued_ns for _, queued_ns, _ in self._tickets.values()), default=None)

"""The coordinator: the queue of rollouts and the judge of their attempts, a view of the topic `rollouts`.

Read service.py (the flow, how it starts), then engine.py (what a command promises), then state.py (the fold). Around
them: commands.py (which events), work_queue.py (the order), leases.py (who was heard of), term.py (one coordinator at a
time, dead letters), log.py (reading), end_waits.py (who waits for whom),
views.py and api.py (HTTP).
"""

from __future__ import annotations

from fulgurite.consumers.coordinator.service import serve
from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import Settings

__all__ = ["main", "serve"]


def main(settings: Settings) -> int:
    """`fulgurite coordinator`: runs until SIGTERM, gives the exit code (5 when another coordinator took over)."""
    return run_service("coordinator", settings.log, lambda stop: serve(settings, stop))

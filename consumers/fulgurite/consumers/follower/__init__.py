"""The follower: brings every policy server to the newest version on `resources`, verified, and keeps it there.

    resources (compacted) ──► newest version ──► one loop a server: compare, verify, pause, load, label, resume, check
                                                     │
                                                     └──► topic `training`: VersionApplied, ok or refused and why

| file | holds |
|---|---|
| `service.py` | the process: reading the topic (FastStream), one loop a server, a clean stop |
| `converge.py` | the loop and its numbered contract |
| `versions.py` | the newest versions, and whether their files are what was announced |
| `server.py` | a server's weight routes |

vLLM has these routes only with VLLM_SERVER_DEV_MODE=1, and its API key does not guard them: loopback or a private
network.
"""

from __future__ import annotations

from fulgurite.consumers.follower.service import serve
from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import Settings

__all__ = ["main", "serve"]


def main(settings: Settings) -> int:
    return run_service("follower", settings.log, lambda stop: serve(settings, stop))

"""The follower: brings every policy server to the newest version on `resources`, verified, and keeps it there.

    resources (compacted) ──► newest version ──► one loop a server: compare, fetch and verify, load, check
                                                     │
                                                     └──► topic `training`: VersionApplied, ok or refused and why

| file | holds |
|---|---|
| `service.py` | the process: reading the topic (FastStream), one loop a server, a clean stop |
| `owner.py` | which follower acts, of those of one resource |
| `converge.py` | the loop and its numbered contract |
| `weights.py` | full weights: pause, load, hash, label, resume |
| `transfer.py` | one server's sender, where weights go from GPU to GPU |
| `sender.py` | that process: the tensors of a folder, over vLLM's weight-transfer routes |
| `adapters.py` | LoRA adapters: load beside the others, unload old ones |
| `draining.py` | until when unloaded ones may have requests |
| `layout.py` | which tensors files have, by their headers |
| `loading.py` | what these two share |
| `versions.py` | the newest versions |
| `files.py` | a version's files, verified, where the server can read them |
| `cache.py` | the follower's own copies of files, and which of them may go |
| `store.py` | copying a folder from an object store |
| `digests.py` | whether servers have the weights they were given |
| `turns.py` | who may pause its server |
| `server.py` | a server's routes |
| `metrics.py` | what Prometheus is told |

vLLM has the routes for weights only with VLLM_SERVER_DEV_MODE=1, and its API key does not guard them: loopback or a
private network. Adapters need --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True instead.
"""

from __future__ import annotations

from fulgurite.consumers.follower.service import serve
from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import Settings

__all__ = ["main", "serve"]


def main(settings: Settings) -> int:
    return run_service("follower", settings.log, lambda stop: serve(settings, stop))

"""A small policy server for a CPU that speaks vLLM's protocol, so that a laptop needs no vLLM. Never the production
path.

Read service.py first. Settings: `policy_server`. Start: `fulgurite policy-server`.
"""

from fulgurite.streams.policy_server.service import main, serve

__all__ = ["main", "serve"]

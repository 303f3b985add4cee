"""Which of the processes that torchrun started this one is. Without torch: it is asked before torch is loaded."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def launched_ranks() -> int:
    """1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether the environment says how to find the other ranks, as torchrun's does, also for one rank alone."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))

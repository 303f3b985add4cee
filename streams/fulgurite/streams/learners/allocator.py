"""Memory of large tensors on a CPU goes back when they are freed.

glibc before 2.38 does not reuse a freed block for an aligned request of the same size (its bug 14581), and torch aligns
all of its tensors: a loop that makes and frees one chunk of logits after another keeps most of them. Blocks above a
threshold are mapped each for itself and cannot be kept, but the threshold rises by itself to 32 MiB when one is freed.
Set once it stays. The price is that the kernel clears a chunk's pages each time.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_M_MMAP_THRESHOLD: Final = -3
"""Of malloc.h."""


def give_back_blocks_of(size_bytes: int) -> None:
    """From here on, for the whole process. Does nothing where there is no glibc, or where it refuses."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, size_bytes)

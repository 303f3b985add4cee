"""Memory for large blocks, kept from one insert to the next: the kernel's work for a fresh page takes longer than all
that is then written to it, in a virtual machine five times as long.

Promises: what is taken belongs to one holder until nothing refers to it any more, Arrow's arrays and their slices
included. Bounds: at most KEPT pieces stay while nobody has them, and one was never larger than what was asked for, and
STEP_BYTES.
"""

from __future__ import annotations

import threading
import weakref
from typing import Final

LEAST_BYTES: Final = 1 << 20
"""Less comes from the allocator, which keeps it by itself."""
STEP_BYTES: Final = 8 << 20
"""Sizes are rounded up to it, so that the next block fits."""
KEPT: Final = 2
"""As many as inserts at once."""


class Kept:
    """Pieces that nobody has at the moment. Of several threads: each insert's block is made in one of its own."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._lock = threading.RLock()
        """Of one thread more than once: a piece may come back, by the collector, while another is taken."""

    @property
    def free_bytes(self) -> int:
        return sum(map(len, self._free))

    def take(self, size: int) -> memoryview:
        """Writable, and of any content. Comes back by itself."""
        if size < LEAST_BYTES:
            return memoryview(bytearray(size))
        with self._lock:
            piece = self._fitting(size)
        if piece is None:
            piece = bytearray(-(-size // STEP_BYTES) * STEP_BYTES)
        view = memoryview(piece)[:size]
        # Whoever exports the view's bytes, as Arrow's buffers do, refers to the view.
        weakref.finalize(view, self._give, piece).atexit = False
        return view

    def _fitting(self, size: int) -> bytearray | None:
        """The smallest that is large enough. Where there is none, one that is too small goes: it would never fit."""
        self._free.sort(key=len)
        for place, piece in enumerate(self._free):
            if len(piece) >= size:
                return self._free.pop(place)
        if self._free:
            self._free.pop(0)
        return None

    def _give(self, piece: bytearray) -> None:
        with self._lock:
            if len(self._free) < KEPT:
                self._free.append(piece)

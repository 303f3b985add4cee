"""The body of one insert over HTTP: pieces of memory that are sent from where they lie, and once.

Given as bytes the client would copy it three times; given as a generator, once more. Promises: its length goes first,
so that the server takes all of it or fails; it is never sent again, by whatever the client tries after an error: what
became of an insert is asked of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import Payload
from aiohttp.abc import AbstractStreamWriter

_CHUNK_BYTES: Final = 256 * 1024
"""Between which the event loop gets its turn."""
_SMALL_BYTES: Final = 4_096
"""Pieces below this are sent together."""


class Pieces(Payload):
    """For aiohttp."""

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        super().__init__(None)
        self._pieces = _joined(pieces)
        self._size = sum(map(len, self._pieces))

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Raises RuntimeError when it was sent before."""
        if self._consumed:
            raise RuntimeError("an insert is sent once")
        self._consumed = True
        for piece in self._pieces:
            for at in range(0, len(piece), _CHUNK_BYTES):
                await writer.write(piece[at : at + _CHUNK_BYTES])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """For what aiohttp would show of it."""
        return f"{self._size} bytes"


def _joined(pieces: Sequence[bytes | memoryview]) -> list[memoryview]:
    found: list[memoryview] = []
    small: list[bytes | memoryview] = []
    for piece in pieces:
        if len(piece) < _SMALL_BYTES:
            small.append(piece)
            continue
        if small:
            found.append(memoryview(b"".join(small)))
            small.clear()
        found.append(memoryview(piece).cast("B"))
    if small:
        found.append(memoryview(b"".join(small)))
    return found

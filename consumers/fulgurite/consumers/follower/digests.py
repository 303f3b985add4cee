"""Whether servers have the weights they were given, as far as hashes of what they hold can tell.

A server's hashes are of its own tensors: fused, sharded and in its own precision, so they cannot be compared with the
files. What can be known, and is:

- The same files loaded again into the same start of a server give the same hash.
- Two servers that had the same hash for the same files are alike; they have the same hash for the next files too.
  Servers that never agreed may differ in precision or sharding: nothing is concluded from that.
- Other weights give another hash. An unchanged one means that the load did nothing, unless the files' weights are the
  same ones (only a tokenizer changed), which is looked at then.

What it cannot see: weights that are wrong in every server alike. Bounded: the newest few contents are remembered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MAX_CONTENTS: Final = 16
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CHUNK_BYTES: Final = 1 << 20


class Digests:
    """What every server's weights hashed to, by the checksum of the files they were loaded from."""

    def __init__(self) -> None:
        self._by_content: dict[str, dict[str, str]] = {}
        self._alike: set[frozenset[str]] = set()

    def forget(self, server: str) -> None:
        """It was started anew: another precision, perhaps."""
        for found in self._by_content.values():
            found.pop(server, None)
        self._alike = {pair for pair in self._alike if server not in pair}

    def contradiction(self, server: str, sha256: str, digest: str) -> str:
        """Why these cannot be the weights of those files; empty, and remembered, where nothing speaks against it."""
        found = self._by_content.get(sha256, {})
        if found.get(server, digest) != digest:
            return "its weights hash to something else than when the same files were loaded before"
        for other, theirs in found.items():
            if theirs != digest and frozenset((server, other)) in self._alike:
                return f"its weights differ from those of {other}, which has loaded the same files and was alike so far"
        self._alike |= {frozenset((server, other)) for other, theirs in found.items() if theirs == digest}
        self._by_content.setdefault(sha256, {})[server] = digest
        while len(self._by_content) > MAX_CONTENTS:
            del self._by_content[next(iter(self._by_content))]
        return ""


def same_weights(one: Path, other: Path) -> bool | None:
    """Whether two folders hold the same weights, byte by byte; None where one of them is no longer there."""
    try:
        first, second = _weight_files(one), _weight_files(other)
        if not first or not second:
            return None
        return first == second and all(_same(one / name, other / name) for name in first)
    except OSError:
        return None


def _weight_files(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in WEIGHT_SUFFIXES
    }


def _same(one: Path, other: Path) -> bool:
    with one.open("rb") as first, other.open("rb") as second:
        while chunk := first.read(_CHUNK_BYTES):
            if second.read(_CHUNK_BYTES) != chunk:
                return False
    return True

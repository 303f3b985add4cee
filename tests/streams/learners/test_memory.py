"""What a step takes of a machine's memory, as the kernel counts it: not tensors, but what the allocator keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.streams.learners.memory_life import SAMPLED, SEQUENCES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB, and glibc's allocator")
def test_resident_memory_does_not_grow_with_the_vocabulary(tmp_path: Path) -> None:
    vocabularies = 4_000, 32_000
    command = [sys.executable, "-m", "tests.streams.learners.memory_life", str(tmp_path), *map(str, vocabularies)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("growth ")]  # others print there, too
    small, large = (float(value) for _, value in found)
    all_logits = SEQUENCES * SAMPLED * (vocabularies[1] - vocabularies[0]) * 4 / 2**20
    assert large - small < all_logits / 4, (small, large)

"""A real Collector loses nothing it accepted: a short run of collector_chaos.py, where there is a Collector."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.chaos.collector_chaos import run

OTELCOL = os.environ.get("OTELCOL") or shutil.which("otelcol")


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(OTELCOL is None, reason="no Collector: OTELCOL names the binary of infra/collector")
async def test_a_killed_collector_and_a_broker_away_lose_nothing(tmp_path: Path) -> None:
    outcome = await run(Path(str(OTELCOL)), tmp_path, outage_seconds=6)
    assert outcome.accepted
    assert not outcome.lost, str(outcome)

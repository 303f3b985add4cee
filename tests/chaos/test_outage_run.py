"""The tool of `make chaos-outage`, for seconds: what it counts is what happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.materialiser_outage import Result, run_outage
from tests.chaos.outcome import report


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_an_outage_costs_lag_and_nothing_else(tmp_path: Path) -> None:
    result = await run_outage(tmp_path, outage_seconds=8, rate=300, warm_up_seconds=2, settle_seconds=120, say=print)
    assert result.passed, report(result)
    assert result.seconds_down >= 8
    assert result.published_during > 1_000
    assert result.peak_lag_records > 0.7 * result.published_during
    assert result.audit.records == result.published
    assert 0 < result.rss_before_bytes < 1 << 30


def test_a_dead_letter_or_an_end_is_a_failure() -> None:
    assert Result().passed
    assert not Result(dead_letters=1).passed
    assert not Result(ended=["materialiser-1 ended with 1"]).passed

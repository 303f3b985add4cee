"""A short chaos run, and its auditor: that it sees what is lost, doubled or changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiokafka import TopicPartition

from tests.chaos.ledger import Audit, compare, lines
from tests.chaos.materialiser_chaos import WEIGHTS, run_chaos, schedule
from tests.chaos.outcome import report


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_everything_once_whatever_dies(tmp_path: Path) -> None:
    result = await run_chaos(tmp_path, seed=4, seconds=25, records_per_second=100, settle_seconds=120, say=print)
    assert result.passed, report(result)
    assert result.audit.records > 1_000
    assert result.audit.dead_letters > 100
    assert result.kills >= 3


def test_the_schedule_is_the_seeds() -> None:
    assert schedule(7, 100) == schedule(7, 100) != schedule(8, 100)
    assert {disturbance.what for disturbance in schedule(7, 30)} == set(WEIGHTS)


def test_the_auditor_sees_what_is_wrong() -> None:
    part = TopicPartition("spans", 0)
    value = b'{"span_id":"1-0"}\n{"poison \xff"}\n\n{"span_id":"1-2"}\n'
    expected = {(9, index): row for index, row in lines("spans", "span_id", value)}
    assert expected == {
        (9, 0): ("spans", b"1-0"),
        (9, 1): ("dead_letters", b'{"poison \xff"}'),
        (9, 3): ("spans", b"1-2"),
    }
    rows = [(9, index, table, content.hex()) for (_, index), (table, content) in expected.items()]
    for change, seen in (
        (rows, (0, 0, 0)),
        (rows[1:], (1, 0, 0)),
        ([*rows, rows[0]], (0, 1, 0)),
        ([*rows[1:], (9, 0, "dead_letters", b"1-0".hex())], (0, 0, 1)),
        ([*rows, (9, 2, "spans", b"x".hex())], (0, 0, 1)),
    ):
        found = Audit()
        compare(found, part, expected, change)
        assert (found.lost, found.duplicated, found.wrong) == seen
        assert found.clean == (change is rows)

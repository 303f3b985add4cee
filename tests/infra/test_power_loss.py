"""The embedded broker flushes each record when it is told to, and only then."""

from __future__ import annotations

from pathlib import Path

from fulgurite.infra.kafka_config import server_properties

FLUSH = "log.flush.interval.messages=1\n"


def test_fsync_of_the_embedded_broker(tmp_path: Path) -> None:
    assert FLUSH in server_properties(1, 2, tmp_path, fsync=True)
    assert FLUSH not in server_properties(1, 2, tmp_path)

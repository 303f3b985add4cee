"""Judges whether Kafka's log of a partition and its rows in the tables can be of the same records, and says what to do
where they cannot. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fulgurite.consumers.materialiser.blocks import Partition
from fulgurite.consumers.materialiser.errors import OtherLog
from fulgurite.consumers.materialiser.history import Look
from fulgurite.consumers.materialiser.store import TABLES

LAST_MS: Final = 2**32 * 1000
"""Later times do not fit in every column."""


def another(
    partition: Partition, logged: int, end: int, look: Look, times: Mapping[int, int], was_id: str
) -> OtherLog | None:
    """Why the log is another one. `logged` and `end`: where the log of inserts and Kafka's end; `times`: of rows, in
    ms, by offset; `was_id`: the topic's, when this process settled it last."""
    others = [offset for offset, time_ms in times.items() if differ(time_ms, look.times[offset])]
    if others:
        return other_record(partition, min(others))
    if logged > end:
        return ends_before(partition, logged, end)
    if was_id != look.incarnation.topic_id and logged > 0:
        return _made_anew(partition, logged)
    return None


def differ(one_ms: int, other_ms: int) -> bool:
    """Of records with the same offset: whether they are two. A table's times end where ClickHouse's do."""
    return all(0 < time_ms < LAST_MS for time_ms in (one_ms, other_ms)) and one_ms != other_ms


def ends_before(partition: Partition, known: int, end: int) -> OtherLog:
    what = f"{partition} ends at offset {end}, but ClickHouse has its records up to {known - 1}"
    return OtherLog(f"{what}: {_what_to_do(partition, end)}")


def other_record(partition: Partition, offset: int) -> OtherLog:
    what = f"{partition} has another record at offset {offset} than ClickHouse has a row of"
    return OtherLog(f"{what}: {_what_to_do(partition, offset)}")


def _made_anew(partition: Partition, known: int) -> OtherLog:
    what = f"{partition} is of another topic now than ClickHouse has records of, up to {known - 1}"
    return OtherLog(f"{what}: {_what_to_do(partition, 0)}")


def _what_to_do(partition: Partition, offset: int) -> str:
    return (
        "it lost its tail, or the topic was deleted and created again, or this database belongs to another cluster. "
        "It is not read until they agree. Use another kafka.topic_prefix or clickhouse.database, or delete its rows "
        f"from offset {offset} on in {TABLES[partition.topic]}, dead_letters and ingest_log (docs/operations.md, "
        '"A log that is another one"); the materialiser then goes on by itself'
    )

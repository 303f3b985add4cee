"""Questions to ClickHouse whose text grows with what is asked. Pure: who asks them is store.py.

Promises: no text is longer than QUESTION_BYTES, or by the few dozen bytes of what stands around it, however many
partitions and offsets are asked for: the server reads 256 KiB of a query, unless it is told otherwise, and refuses more
for ever.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Final, cast

from fulgurite.consumers.materialiser.blocks import OffsetRange, Partition
from fulgurite.consumers.materialiser.fences import quoted

QUESTION_BYTES: Final = 128 * 1024
"""Of the text, which is ASCII."""
PLACES: Final = 250
"""Of one question: the server is long over a condition of thousands."""

SKIPPED: Final = """
SELECT sum(toInt64(till) - toInt64(greatest(since, least(till, before)))) FROM
(
    SELECT since, till, max(till) OVER (ORDER BY since, till ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
    FROM
    (
        SELECT greatest(s.lo, {lo:UInt64}) AS since, least(s.hi, {hi:UInt64}) + 1 AS till
        FROM ingest_log ARRAY JOIN skipped AS s
        WHERE _topic = {name:String} AND _partition = {number:UInt32} AND ingest_log.lo >= {lo:UInt64}
            AND s.hi >= {lo:UInt64} AND s.lo <= {hi:UInt64}
    )
)
"""
"""How many offsets of lo..hi are skipped; ranges may overlap. They stand in its own entry or in later ones."""


NEWEST: Final = """
SELECT _partition, lo, hi, unasked.lo, unasked.hi FROM ingest_log
WHERE _topic = {name:String} AND _partition IN {numbers:Array(UInt32)} AND (_partition, hi) IN
(
    SELECT _partition, max(hi) FROM ingest_log
    WHERE _topic = {name:String} AND _partition IN {numbers:Array(UInt32)} GROUP BY _partition
)
ORDER BY at DESC LIMIT 1 BY _partition
"""
"""Of each partition, what its newest entry with the highest offset says."""


def logged_condition(ranges: Collection[tuple[Partition, int, int]]) -> str:
    """Holds for rows of these ranges of one topic that the log of inserts has. They are found by its primary key."""
    topic = quoted(next(iter(ranges))[0].name)
    places = ", ".join(f"({partition.number}, {lo})" for partition, lo, _ in ranges)
    return (
        "(_partition, lo, hi) IN (SELECT _partition, lo, hi FROM ingest_log "
        f"WHERE _topic = {topic} AND (_partition, lo) IN ({places}))"
    )


def log_line(row: Mapping[str, object]) -> bytes:
    """A row of the log of inserts as JSON."""
    ranges = {
        name: [{"lo": lo, "hi": hi} for lo, hi in cast("Collection[OffsetRange]", row[name])]
        for name in ("skipped", "unasked")
    }
    return json.dumps({**row, **ranges}).encode() + b"\n"


def missing_query(tables: Collection[str]) -> str:
    """Of offsets lo..hi: how many are in one of these tables, and how many are skipped."""
    where = "_topic = {name:String} AND _partition = {number:UInt32} AND _offset BETWEEN {lo:UInt64} AND {hi:UInt64}"
    parts = (f"SELECT _offset FROM {table} WHERE {where}" for table in tables)
    return f"SELECT uniqExact(_offset), ({SKIPPED}) FROM ({' UNION ALL '.join(parts)})"


def since_conditions(since: Mapping[Partition, int]) -> Iterator[str]:
    """Each holds for rows of some partitions of one topic, from these offsets on; together for all."""
    places = [f"(_partition = {partition.number} AND _offset >= {lo})" for partition, lo in since.items()]
    for begin in range(0, len(places), PLACES):
        yield f"({' OR '.join(places[begin : begin + PLACES])})"


def times_queries(table: str, offsets: Mapping[Partition, Collection[int]]) -> Iterator[str]:
    """Partition, offset and Kafka's time in ms of those that are in the table, of one topic, which is a parameter. As
    few as there may be: each reads the table's offsets."""
    for places in _shares(offsets):
        where = " OR ".join(
            f"(_partition = {number} AND _offset IN ({', '.join(map(str, some))}))" for number, some in places.items()
        )
        yield (
            f"SELECT DISTINCT _partition, _offset, toUnixTimestamp64Milli(_ts) FROM {table} "
            f"WHERE _topic = {{name:String}} AND ({where})"
        )


def _shares(offsets: Mapping[Partition, Collection[int]]) -> Iterator[dict[int, list[int]]]:
    """Offsets by the partition's number, as many as one text has room for."""
    share: dict[int, list[int]] = defaultdict(list)
    used = 0
    for partition, some in offsets.items():
        for offset in some:
            size = len(str(offset)) + 2  # a comma and a space
            if partition.number not in share:
                size += len(f" OR (_partition = {partition.number} AND _offset IN ())")
            if share and used + size > QUESTION_BYTES:
                yield dict(share)
                share.clear()
                used = len(f"(_partition = {partition.number} AND _offset IN ())")
            share[partition.number].append(offset)
            used += size
    if share:
        yield dict(share)

"""Who may insert a partition's records: the materialiser that wrote its greatest fence. The guard is in ClickHouse,
within each insert, and so also stops one that left its sender long ago.

    take      INSERT INTO ingest_fences: an epoch greater than any that is there, one for all partitions at once
    guard     INSERT INTO in_spans … SELECT … FROM input() WHERE (the greatest fences are these, or throw)
    quiet     no insert that has one of these partitions is in system.processes

Why it holds. The server enters a query in system.processes before it evaluates the query's subqueries, and takes it out
after its last row is in or it has failed. Let F be the fence of an owner, acknowledged, and let that owner have seen
quiet after that, and then have asked what is in the tables. Take any insert Q of the partition with another fence G.

    Q evaluated its guard before F was acknowledged: it was in system.processes by then, and quiet waited for its end.
    Q evaluates it afterwards, G < F: it sees that F is greater, and throws before its first row.
    Q evaluates it afterwards, G > F, and passes: G is there. Every insert of F's owner from then on sees G and throws:
    what it knows of the tables is not used any more.

So while an owner's inserts pass their guard, nobody else has inserted since it asked. Its own insert of unknown end has
its older fence, and is such a Q. Two that take the same epoch differ in the rest of the fence; one of them is greater.

The guard also looks for an entry of each partition in the log of inserts, its mark, and throws where it is gone:
then an older copy of the database was restored under its owner, who has to ask the tables again.

`fulgurite replay` claims partitions in the same way, with fences and inserts under another name (its store.py): of
replays only the last one that claimed inserts, and none keeps the materialiser from inserting.

What that stands on. One server, or always the same replica of several: the next query must see fences, processes and
rows of the last one, which no other replica promises, and a load balancer breaks it. One user for all materialisers, or
one that may see the queries of others. An engine that crashes takes its running inserts with it. Should it forget
fences in a power failure (clickhouse.fsync is against that), the greatest that is left decides, and who is refused
takes a new one and asks the tables again.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fulgurite.consumers.materialiser.blocks import Partition, Slice

REFUSAL: Final = "fenced by another owner"
"""In the message of an insert that its guard refused, whose code is REFUSAL_CODE."""
REFUSAL_CODE: Final = 395

WENT_BACK: Final = "the log of inserts lacks what it had: an older copy of the database was restored"
"""In the message of an insert whose partition's mark is gone; its code is the same."""

PREFIX: Final = "fulgurite materialiser"


@dataclass(frozen=True, slots=True)
class Guard:
    """What keeps an insert from coming twice, and by what it is known while it runs."""

    comment: str
    """Its log_comment."""
    condition: str = ""
    """SQL that throws where it must not go on."""
    settings: Mapping[str, str | int] = field(default_factory=dict[str, str | int])


def greater_fence(greatest: str, consumer: str) -> str:
    """A fence of the next epoch. `greatest`: of those that are there, "" where there is none."""
    epoch = int(greatest[:12] or 0) + 1
    return f"{epoch:012d} {consumer} {secrets.token_hex(8)}"


def renewed(fence: str) -> str:
    """A greater one of the same epoch: whoever took a later one, or a greater one of this, keeps the partition."""
    taken, _, number = fence.partition("+")
    return f"{taken}+{int(number or 0) + 1:09d}"


def fenced(database: str, slices: Sequence[Slice]) -> Guard:
    """The guard of an insert of these slices, by their fences."""
    name = quoted(slices[0].partition.name)
    numbers = ", ".join(str(slice.partition.number) for slice in slices)
    own = ", ".join(f"({slice.partition.number}, {quoted(slice.fence)})" for slice in slices)
    condition = (
        f"(SELECT throwIf(count() != {len(slices)}, '{REFUSAL}') FROM ("
        "SELECT _partition, max(fence) AS greatest FROM ingest_fences "
        f"WHERE _topic = {name} AND _partition IN ({numbers}) GROUP BY _partition"
        f") WHERE (_partition, greatest) IN ({own})) = 0"
    )
    if marks := {slice.partition.number: slice.mark for slice in slices if slice.mark is not None}:
        condition += f" AND (SELECT throwIf(count() != {len(marks)}, '{WENT_BACK}') FROM ({_marks(name, marks)})) = 0"
    comment = running_prefix(database, slices[0].partition.name) + numbers.replace(" ", "")
    # Nothing is remembered of an insert: what is in the tables is known without.
    return Guard(comment, condition, {"insert_deduplicate": 0})


def marks_query(topic: str, marks: Mapping[int, int]) -> str:
    """Selects those of the marks, by partition, that are in the log of inserts. They are found by its primary key."""
    return _marks(quoted(topic), marks)


def _marks(quoted_topic: str, marks: Mapping[int, int]) -> str:
    pairs = ", ".join(f"({number}, {lo})" for number, lo in marks.items())
    where = f"_topic = {quoted_topic} AND (_partition, lo) IN ({pairs})"
    return f"SELECT DISTINCT _partition, lo FROM ingest_log WHERE {where}"


def running_prefix(database: str, topic: str) -> str:
    """How the log_comment of an insert into a topic begins; the numbers of its partitions follow."""
    return f"{PREFIX} {database} {topic} "


RUNNING = """
SELECT count() FROM system.processes
WHERE startsWith(Settings['log_comment'], {prefix:String})
    AND hasAny(arrayMap(n -> toUInt32OrZero(n), splitByChar(',', substring(Settings['log_comment'],
        length({prefix:String}) + 1))), {numbers:Array(UInt32)})
"""
"""How many inserts run that have one of these partitions."""


def running_parameters(database: str, partitions: Sequence[Partition]) -> dict[str, Any]:
    """Of RUNNING. The partitions are of one topic."""
    numbers = [partition.number for partition in partitions]
    return {"prefix": running_prefix(database, partitions[0].name), "numbers": numbers}


def quoted(text: str) -> str:
    """As a literal of SQL."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

"""The table replay_log: which replays were begun, how far they are. Append-only; knows nothing of Kafka."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fulgurite.schemas.ids import new_id

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

BEGUN, WHOLE, PART, DONE = "begun", "whole", "part", "done"
WITHDRAWN, ENDING, ABANDONED = "withdrawn", "ending", "abandoned"

TABLE = "replay_log"
COLUMNS = ("replay_id", "_topic", "_partition", "state", "lo", "hi", "rebuild", "asked", "who")

_ENDS = f"'{DONE}', '{WITHDRAWN}', '{ABANDONED}'"


@dataclass(frozen=True, slots=True)
class Mark:
    """One partition of one replay."""

    replay_id: str
    topic: str
    """Full name."""
    partition: int
    lo: int
    hi: int
    """Excluded."""
    rebuild: bool
    asked: str
    """The options it was begun with: who gives the same again goes on with it."""
    who: str = ""
    next: int = 0
    """Everything before this offset is done."""
    whole: int = 0
    """Of everything before this offset, at least `next`, all rows were made."""
    begun_ms: int = 0
    """By the server's clock; 0 where it is not written yet."""
    ending_ms: int = 0
    """When --abandon began to end it, by the same clock: nothing is inserted or becomes whole since. 0: it did not."""

    @property
    def begun(self) -> str:
        return f"{datetime.fromtimestamp(self.begun_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def unfinished(client: Client, topic: str) -> list[Mark]:
    """Partitions of replays of the topic that nobody ended, the oldest first."""
    result = client.query(
        f"SELECT replay_id, _partition, anyIf(lo, state = '{BEGUN}'), anyIf(hi, state = '{BEGUN}'), any(rebuild), "
        f"any(asked), anyIf(who, state = '{BEGUN}'), maxIf(hi, state = '{PART}'), "
        f"maxIf(hi, state = '{WHOLE}'), toUnixTimestamp64Milli(minIf(at, state = '{BEGUN}')) AS begun_at, "
        f"toUnixTimestamp64Milli(minIf(at, state = '{ENDING}')) "
        "FROM replay_log WHERE _topic = {topic:String} GROUP BY replay_id, _partition "
        f"HAVING countIf(state IN ({_ENDS})) = 0 ORDER BY begun_at, replay_id, _partition",
        parameters={"topic": topic},
    )
    return [
        Mark(id, topic, number, lo, hi, bool(anew), asked, who, max(lo, done), max(lo, done, whole), begun, ending)
        for id, number, lo, hi, anew, asked, who, done, whole, begun, ending in result.result_rows
    ]


def still_unfinished(client: Client, topic: str, found: Sequence[Mark]) -> list[Mark]:
    """Those of them that nobody ended meanwhile, as they are now."""
    known = {(mark.replay_id, mark.partition) for mark in found}
    return [mark for mark in unfinished(client, topic) if (mark.replay_id, mark.partition) in known]


def write(client: Client, marks: Sequence[Mark], state: str) -> None:
    """One row each; when this returns they are there."""
    rows = [list(row(mark, state).values()) for mark in marks]
    settings = {"insert_deduplication_token": new_id(), "insert_deduplicate": 1, "async_insert": 0}
    client.insert(TABLE, rows, column_names=COLUMNS, settings=settings)


def row(mark: Mark, state: str) -> dict[str, str | int]:
    """By COLUMNS."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    values = (mark.replay_id, mark.topic, mark.partition, state, mark.lo, mark.hi, mark.rebuild, mark.asked, who)
    return dict(zip(COLUMNS, values, strict=True))

"""The table replay_log: which replays were begun, how far they are. Append-only; knows nothing of Kafka."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fulgurite.schemas.ids import new_id

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

BEGUN, WHOLE, PART, DONE, WITHDRAWN, ABANDONED = "begun", "whole", "part", "done", "withdrawn", "abandoned"

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

    @property
    def begun(self) -> str:
        return f"{datetime.fromtimestamp(self.begun_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def unfinished(client: Client, topic: str) -> list[Mark]:
    """Partitions of replays of the topic that nobody ended, the oldest first."""
    result = client.query(
        f"SELECT replay_id, _partition, anyIf(lo, state = '{BEGUN}'), anyIf(hi, state = '{BEGUN}'), any(rebuild), "
        f"any(asked), any(who), maxIf(hi, state = '{PART}'), "
        f"maxIf(hi, state = '{WHOLE}'), toUnixTimestamp64Milli(minIf(at, state = '{BEGUN}')) AS begun_at "
        "FROM replay_log WHERE _topic = {topic:String} GROUP BY replay_id, _partition "
        f"HAVING countIf(state IN ({_ENDS})) = 0 ORDER BY begun_at, replay_id, _partition",
        parameters={"topic": topic},
    )
    return [
        Mark(replay_id, topic, partition, lo, hi, bool(rebuild), asked, who, max(lo, done), max(lo, done, whole), begun)
        for replay_id, partition, lo, hi, rebuild, asked, who, done, whole, begun in result.result_rows
    ]


def write(client: Client, marks: Sequence[Mark], state: str) -> None:
    """One row each; when this returns they are there."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    rows = [[m.replay_id, m.topic, m.partition, state, m.lo, m.hi, m.rebuild, m.asked, who] for m in marks]
    names = ("replay_id", "_topic", "_partition", "state", "lo", "hi", "rebuild", "asked", "who")
    settings = {"insert_deduplication_token": new_id(), "insert_deduplicate": 1, "async_insert": 0}
    client.insert("replay_log", rows, column_names=names, settings=settings)


def write_piece(client: Client, mark: Mark, lo: int, hi: int, state: str) -> None:
    """4 and 5: this piece of it is whole, or done."""
    write(client, [replace(mark, lo=lo, hi=hi)], state)

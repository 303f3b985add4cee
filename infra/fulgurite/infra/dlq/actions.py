"""What was done about dead letters: the table dead_letter_actions, only ever added to, and what it says of a letter.

Promises: a step that was written is there for every later question; written again by a retry it counts once.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fulgurite.infra.dlq.letters import PLACES_PER_QUERY, Place
from fulgurite.schemas.ids import new_id

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

MENDED, INTENDED, SENT, WITHDRAWN = "mended", "intended", "sent", "withdrawn"

_COLUMNS = (
    *("topic", "partition", "offset", "index", "action", "action_id", "mend_id", "value", "how"),
    *("to_topic", "to_partition", "to_offset", "who"),
)


@dataclass(frozen=True, slots=True)
class Mend:
    """Bytes to send in place of the original ones. The newest of a letter counts."""

    mend_id: str
    value: bytes
    how: str
    who: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Replay:
    """One replay of one letter, as the view dead_letter_replays has it."""

    place: Place
    replay_id: str
    state: str
    """intended, sent or withdrawn."""
    mend_id: str
    intended_at: datetime
    sent_at: datetime
    who: str
    to: Place
    """Where it lies; while it is only intended: at or after which offset it would."""
    tables: tuple[str, ...]
    verdicts: tuple[tuple[str, str, str], ...]
    """(stage, reason, message): it is a dead letter again."""
    age_seconds: float
    """Of the intent, by the server's clock."""


@dataclass(frozen=True, slots=True)
class Step:
    """One row to write."""

    place: Place
    action: str
    action_id: str
    mend_id: str = ""
    value: bytes = b""
    how: str = ""
    to: Place | None = None


def write(client: Client, steps: Sequence[Step]) -> None:
    """All of them in one insert; when this returns they are there."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    rows = [
        [
            *(s.place.topic, s.place.partition, s.place.offset, s.place.index, s.action, s.action_id, s.mend_id),
            *(s.value, s.how),
            *((s.to.topic, s.to.partition, s.to.offset) if s.to else ("", -1, -1)),
            who,
        ]
        for s in steps
    ]
    # A connection that breaks while the answer is on its way is tried again by the client library.
    settings = {"insert_deduplication_token": new_id(), "insert_deduplicate": 1, "async_insert": 0}
    client.insert("dead_letter_actions", rows, column_names=_COLUMNS, settings=settings)


def mends(client: Client, places: Iterable[Place]) -> dict[Place, Mend]:
    """The newest mend of each letter that has one."""
    wanted = set(places)
    found: dict[Place, Mend] = {}
    for bounds in _bounds(wanted):
        result = client.query(
            "SELECT topic, partition, offset, `index`, argMax(action_id, (at, action_id)), "
            "argMax(a.value, (at, action_id)) AS value, argMax(how, (at, action_id)), argMax(who, (at, action_id)), "
            "max(at) FROM dead_letter_actions AS a WHERE action = 'mended' AND topic IN {topics:Array(String)} "
            "AND offset IN {offsets:Array(Int64)} GROUP BY topic, partition, offset, `index`",
            parameters=bounds,
            column_formats={"value": "bytes"},
        )
        for topic, partition, offset, index, mend_id, value, how, who, at in result.result_rows:
            place = Place(topic, partition, offset, index)
            if place in wanted:
                found[place] = Mend(mend_id, bytes(value), how, who, at)
    return found


def replays(client: Client, places: Iterable[Place]) -> dict[Place, list[Replay]]:
    """All replays of these letters, the newest first."""
    wanted = set(places)
    where = "topic IN {topics:Array(String)} AND offset IN {offsets:Array(Int64)}"
    found: dict[Place, list[Replay]] = {}
    for bounds in _bounds(wanted):
        for replay in _replays(client, where, bounds):
            known = found.setdefault(replay.place, [])
            if replay.place in wanted and replay not in known:
                known.append(replay)
    return {place: known for place, known in found.items() if known}


def newest_replays(client: Client, limit: int) -> list[Replay]:
    """Of all letters, the newest first."""
    return _replays(client, "1", {}, limit)


def replays_to(client: Client, place: Place) -> list[Replay]:
    """Which replays made the record at this place."""
    return _replays(
        client,
        "state = 'sent' AND to_topic = {topic:String} AND to_partition = {partition:Int32} "
        "AND to_offset = {offset:Int64}",
        {"topic": place.topic, "partition": place.partition, "offset": place.offset},
    )


def rivals(client: Client, own: Mapping[Place, str], known: Collection[str]) -> set[Place]:
    """Of these letters, those of which another replay than ours and those known is begun, or even done."""
    found: set[Place] = set()
    for bounds in _bounds(own):
        result = client.query(
            "SELECT topic, partition, offset, `index`, action_id FROM dead_letter_actions "
            f"WHERE action != '{MENDED}' AND topic IN {{topics:Array(String)}} AND offset IN {{offsets:Array(Int64)}} "
            f"GROUP BY topic, partition, offset, `index`, action_id HAVING countIf(action = '{WITHDRAWN}') = 0",
            parameters=bounds,
        )
        for topic, partition, offset, index, replay_id in result.result_rows:
            place = Place(topic, partition, offset, index)
            if place in own and replay_id != own[place] and replay_id not in known:
                found.add(place)
    return found


def _replays(client: Client, where: str, parameters: dict[str, Any], limit: int = 100_000) -> list[Replay]:
    result = client.query(
        "SELECT topic, partition, offset, `index`, replay_id, state, mend_id, intended_at, sent_at, who, to_topic, "
        "to_partition, to_offset, tables, verdicts, dateDiff('millisecond', intended_at, now64(3)) AS age "
        f"FROM dead_letter_replays WHERE {where} ORDER BY intended_at DESC, replay_id DESC LIMIT {limit:d}",
        parameters=parameters,
    )
    return [
        Replay(
            place=Place(row["topic"], row["partition"], row["offset"], row["index"]),
            replay_id=row["replay_id"],
            state=row["state"],
            mend_id=row["mend_id"],
            intended_at=row["intended_at"],
            sent_at=row["sent_at"],
            who=row["who"],
            to=Place(row["to_topic"], row["to_partition"], row["to_offset"]),
            tables=tuple(row["tables"]),
            verdicts=tuple(tuple(verdict) for verdict in row["verdicts"]),
            age_seconds=row["age"] / 1000,
        )
        for row in result.named_results()
    ]


def _bounds(places: Iterable[Place]) -> Iterator[dict[str, Any]]:
    """Parameters that hold these places and perhaps others; so many at once that a request stays small."""
    known = sorted(places)
    for start in range(0, len(known), PLACES_PER_QUERY):
        part = known[start : start + PLACES_PER_QUERY]
        yield {"topics": sorted({p.topic for p in part}), "offsets": sorted({p.offset for p in part})}

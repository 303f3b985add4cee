"""Dead letters, asked from ClickHouse: one for every refused record or line, however many readers refused it.

A dead letter's place is that of the record it was: topic/partition/offset/index. What never was a record (an answer the
gateway could not record) has the place of the dead letter itself. Knows nothing of mends and replays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fulgurite.consumers.materialiser.blocks import GIVEN_UP
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import TOPICS, Topic

if TYPE_CHECKING:
    from clickhouse_connect.driver import Client

MAX_LETTERS = 10_000
"""Most that one command takes: they are held in memory with their bytes."""

PLACES_PER_QUERY = 1_000
"""So that a request stays small."""

_OF_RECORDS = ("undecodable", "rejected", *GIVEN_UP)
"""Reasons of dead letters that are all of a record, whose lines nobody told apart."""

_FIELDS = "topic, partition, offset, `index`, stage, reason, message, original_topic, first_time, time, verdicts"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a refused record lay. The topic by its full name."""

    topic: str
    partition: int
    offset: int
    index: int = 0
    """The line within the record, from 0."""

    def header(self) -> str:
        """As the header `fulgurite.replay_of` has it."""
        return f"{self.topic}/{self.partition}/{self.offset}/{self.index}"


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. `key` and `value` are there only where they were asked for."""

    place: Place
    stage: str
    reason: str
    message: str
    original_topic: str
    """Where it belongs; empty where it never was a record of a topic."""
    first_time: datetime
    time: datetime
    key: bytes = b""
    value: bytes = b""
    verdicts: tuple[tuple[str, str, str], ...] = ()
    """(stage, reason, message) of everyone who refused it."""

    @property
    def is_record(self) -> bool:
        """Whether it is all of a record, and not one of its lines."""
        return self.reason in _OF_RECORDS and self.place.index == 0


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters. Empty is any."""

    topic: str = ""
    """Full name of the original topic."""
    stage: str = ""
    reason: str = ""
    since: datetime | None = None
    waiting: bool = False
    """Only those that were never sent again."""
    mended: bool = False
    """Only those with a mend."""

    def where(self) -> tuple[str, dict[str, Any]]:
        """A condition over dead_letter_verdicts, with its parameters."""
        conditions = ["1"]
        parameters: dict[str, Any] = {}
        if self.topic:
            conditions.append("(topic = {topic:String} OR original_topic = {topic:String})")
            parameters["topic"] = self.topic
        if self.stage:
            conditions.append("stage = {stage:String}")
            parameters["stage"] = self.stage
        if self.reason:
            conditions.append("reason = {reason:String}")
            parameters["reason"] = self.reason
        if self.since is not None:
            conditions.append("time >= fromUnixTimestamp64Milli({since_ms:Int64}, 'UTC')")
            parameters["since_ms"] = int(self.since.timestamp() * 1000)
        if self.waiting:
            conditions.append(
                "(topic, partition, offset, `index`) NOT IN "
                "(SELECT topic, partition, offset, `index` FROM dead_letter_actions WHERE action = 'sent')"
            )
        if self.mended:
            conditions.append(
                "(topic, partition, offset, `index`) IN "
                "(SELECT topic, partition, offset, `index` FROM dead_letter_actions WHERE action = 'mended')"
            )
        return " AND ".join(conditions), parameters


@dataclass(frozen=True, slots=True)
class Group:
    """Dead letters of one topic with one reason."""

    topic: str
    stage: str
    reason: str
    count: int
    first_time: datetime
    last_time: datetime
    example: Place
    message: str


def topic_named(settings: KafkaSettings, name: str) -> Topic | None:
    """The topic of this name, with or without the prefix; None for a name of somebody else."""
    for topic in TOPICS:
        if name in (topic.name, settings.topic(topic)):
            return topic
    return None


def parse_place(settings: KafkaSettings, text: str) -> Place:
    """`spans/3/1042`, `spans/3/1042/7`, also with the topic's full name. Raises SettingsError."""
    name, *numbers = text.strip().split("/")
    topic = topic_named(settings, name)
    if topic is None:
        known = ", ".join(topic.name for topic in TOPICS)
        raise SettingsError(f"{text}: there is no topic {name}; an ID begins with one of {known}")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() and len(number) < 19 for number in numbers):
        raise SettingsError(
            f"{text}: an ID is TOPIC/PARTITION/OFFSET or TOPIC/PARTITION/OFFSET/LINE, as in spans/3/1042"
        )
    partition, offset, *index = (int(number) for number in numbers)
    return Place(settings.topic(topic), partition, offset, index[0] if index else 0)


def short_id(settings: KafkaSettings, place: Place) -> str:
    """As `parse_place` reads it, as short as it may be."""
    topic = topic_named(settings, place.topic)
    name = topic.name if topic else place.topic
    return f"{name}/{place.partition}/{place.offset}" + (f"/{place.index}" if place.index else "")


def newest(client: Client, chosen: Filter, limit: int) -> list[Letter]:
    """The newest first, without their bytes."""
    places = _places(client, chosen, "time DESC, topic, partition, offset DESC, `index` DESC", limit)
    found = {letter.place: letter for letter in at(client, places, with_bytes=False)}
    return [found[place] for place in places if place in found]


def matching(client: Client, chosen: Filter, limit: int) -> list[Letter]:
    """In the order of the log, with their bytes: as they are to be sent again."""
    return at(client, _places(client, chosen, "topic, partition, offset, `index`", limit))


def at(client: Client, places: Sequence[Place], *, with_bytes: bool = True) -> list[Letter]:
    """Those of these places that exist, in the order of the log."""
    letters: list[Letter] = []
    ordered = sorted(places)
    fields = f"{_FIELDS}, key, value" if with_bytes else _FIELDS
    for start in range(0, len(ordered), PLACES_PER_QUERY):
        part = set(ordered[start : start + PLACES_PER_QUERY])
        # As bytes: they are not always text, which is often why they are here.
        result = client.query(
            f"SELECT {fields} FROM dead_letter_records "
            "WHERE topic IN {topics:Array(String)} AND offset IN {offsets:Array(Int64)} "
            "ORDER BY topic, partition, offset, `index`",
            parameters={"topics": sorted({p.topic for p in part}), "offsets": sorted({p.offset for p in part})},
            column_formats={"key": "bytes", "value": "bytes"} if with_bytes else {},
        )
        letters += [letter for row in result.named_results() if (letter := _letter(row)).place in part]
    return letters


def _places(client: Client, chosen: Filter, order: str, limit: int) -> list[Place]:
    """Where the first `limit` of them lie. Several readers may have refused one: their verdicts are read until enough
    places are found."""
    where, parameters = chosen.where()
    wanted = 2 * limit
    while True:
        result = client.query(
            f"SELECT topic, partition, offset, `index` FROM dead_letter_verdicts WHERE {where} "
            f"ORDER BY {order} LIMIT {wanted:d}",
            parameters=parameters,
        )
        places = list(dict.fromkeys(Place(str(row[0]), *map(int, row[1:])) for row in result.result_rows))
        if len(places) >= limit or len(result.result_rows) < wanted:
            return places[:limit]
        wanted *= 4


def lines_at(client: Client, place: Place) -> list[Place]:
    """Other dead letters of the same record, whatever their line."""
    result = client.query(
        "SELECT topic, partition, offset, `index` FROM dead_letter_records "
        "WHERE topic = {topic:String} AND partition = {partition:Int32} AND offset = {offset:Int64} "
        "ORDER BY `index` LIMIT 20",
        parameters={"topic": place.topic, "partition": place.partition, "offset": place.offset},
    )
    return [Place(str(row[0]), *(int(number) for number in row[1:])) for row in result.result_rows]


def grouped(client: Client, chosen: Filter) -> list[Group]:
    """By topic, stage and reason, the most frequent first. What two readers refused is in both of their groups."""
    where, parameters = chosen.where()
    result = client.query(
        "SELECT if(original_topic = '', topic, original_topic) AS belongs, stage, reason, "
        "uniqExact(topic, partition, offset, `index`) AS letters, min(time), max(time) AS last, "
        "argMax((topic, partition, offset, `index`), time), argMax(message, time) "
        f"FROM dead_letter_verdicts WHERE {where} GROUP BY belongs, stage, reason "
        "ORDER BY letters DESC, belongs, stage, reason LIMIT 1000",
        parameters=parameters,
    )
    return [
        Group(topic, stage, reason, count, first, last, Place(*example), message)
        for topic, stage, reason, count, first, last, example, message in result.result_rows
    ]


def _letter(row: Mapping[str, Any]) -> Letter:
    return Letter(
        place=Place(row["topic"], row["partition"], row["offset"], row["index"]),
        stage=row["stage"],
        reason=row["reason"],
        message=row["message"],
        original_topic=row["original_topic"],
        first_time=row["first_time"],
        time=row["time"],
        key=bytes(row.get("key", b"")),
        value=bytes(row.get("value", b"")),
        verdicts=tuple(tuple(verdict) for verdict in row["verdicts"]),
    )

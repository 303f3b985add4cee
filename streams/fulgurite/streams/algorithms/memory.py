"""Steps 1 and 2 of an algorithm's contract (service.py): where it begins, and what it remembers of open groups.

What is remembered of a group is where its members lie; they are read again from `trajectories`. One that Kafka's
retention has taken meanwhile is missing from its group, which its deadline then closes; the log says so.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from fulgurite.producers.backoff import Backoff
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import fetch, fetch_up_to, log_ends, value_of
from fulgurite.schemas.algorithms import AlgorithmState
from fulgurite.schemas.codec import decode, encode, encode_key
from fulgurite.schemas.errors import InvalidEvent, SettingsError
from fulgurite.schemas.rollouts import MAX_GROUP_SIZE
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import ALGORITHM_STATE, TRAJECTORIES
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.groups import Group, GroupState, Record
from fulgurite.streams.trainer.log import partitions_of
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.transactions import Outgoing, patiently

logger = logging.getLogger(__name__)

WHEN_GONE = "Started again, it goes on behind that"
"""What to do where Kafka has removed what was to be read next: see `still_there`."""

_POLL_MS = 200


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that nobody can read: there was one, so it must not be taken for nothing."""

    why: str


@dataclass(frozen=True, slots=True)
class Start:
    """Where an algorithm begins that never ran under its name: one of the four."""

    at: str = "beginning"
    """beginning, latest, an offset (of every partition) or a time such as 2026-11-21T08:00 (UTC)."""

    @classmethod
    def parse(cls, text: str) -> Start:
        """Raises SettingsError."""
        if text not in ("beginning", "latest") and not text.isdecimal():
            try:
                datetime.fromisoformat(text)
            except ValueError:
                raise SettingsError(
                    f"--from {text}: beginning, latest, an offset such as 1000, or a time such as 2026-11-21T08:00"
                ) from None
        return cls(text)

    async def offsets(self, settings: KafkaSettings, partitions: Sequence[TopicPartition]) -> dict[int, int]:
        """By partition, within what Kafka still has. Waits for the broker."""

        async def ask() -> dict[int, int]:
            async with connected(settings) as consumer:
                begins = await consumer.beginning_offsets(partitions)
                ends = await consumer.end_offsets(partitions)
                if self.at == "beginning":
                    wanted = dict(begins)
                elif self.at == "latest":
                    wanted = dict(ends)
                elif self.at.isdecimal():
                    wanted = dict.fromkeys(partitions, int(self.at))
                else:
                    time = datetime.fromisoformat(self.at)
                    time = time if time.tzinfo else time.replace(tzinfo=UTC)
                    found = await consumer.offsets_for_times(dict.fromkeys(partitions, int(time.timestamp() * 1000)))
                    wanted = {tp: at.offset if (at := found.get(tp)) else ends[tp] for tp in partitions}
                return {tp.partition: min(max(at, begins[tp]), ends[tp]) for tp, at in wanted.items()}

        return await patiently("where to begin", ask)


class connected:
    """A read_committed consumer that is assigned by hand, closed in the end."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._consumer = AIOKafkaConsumer(
            **connection_options(settings),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )

    async def __aenter__(self) -> AIOKafkaConsumer:
        try:
            await self._consumer.start()
        except BaseException:
            await self._consumer.stop()
            raise
        return self._consumer

    async def __aexit__(self, *error: object) -> None:
        await self._consumer.stop()


async def remembered(settings: KafkaSettings, algorithm: str) -> dict[str, Any]:
    """The newest value of every name of this algorithm, as committed now, the oldest first. Waits for Kafka, and for
    others' transactions that are still open: they hide what was committed behind them.

    A value that cannot be read is Unreadable."""
    topic = settings.topic(ALGORITHM_STATE)
    partitions = await partitions_of(settings, topic)
    prefix = f"{algorithm}/".encode()

    async def read() -> dict[str, Any]:
        found: dict[bytes, Record] = {}
        async with connected(settings) as consumer:
            consumer.assign(partitions)
            async for fetched in fetch_up_to(settings, consumer, await log_ends(settings, partitions)):
                for records in fetched.values():
                    found.update({r.key: r for r in records if r.key is not None and r.key.startswith(prefix)})
        oldest_first = sorted(found.items(), key=lambda item: item[1].timestamp)
        return {key.removeprefix(prefix).decode(): _value(r) for key, r in oldest_first if not _is_tombstone(r)}

    return await patiently(f"what {algorithm} remembers", read)


async def still_there(reader: TrajectoryReader, offsets: Mapping[int, int]) -> dict[int, int]:
    """The offsets to go on from, behind what Kafka's retention has taken meanwhile: nobody can read that any more, and
    what comes after it must not wait for it. The log says how much it is."""
    begins = await reader.first_offsets()
    found = {number: max(offsets.get(number, 0), begin) for number, begin in begins.items()}
    for tp in reader.partitions:
        begin, at = found[tp.partition], offsets.get(tp.partition, 0)
        if tp.partition in offsets and at < begin:
            logger.error(
                "%s-%d: offsets %d to %d were not read, and Kafka no longer has them: its retention is over. What was "
                "in them is lost here; going on behind them", tp.topic, tp.partition, at, begin - 1,
            )  # fmt: skip
    return found


def remembering(settings: KafkaSettings, algorithm: str, name: str, value: Any) -> Outgoing:
    """The record that says so; value None: nothing any more."""
    state = AlgorithmState(algorithm=algorithm, name=name, value=value)
    encoded = None if value is None else encode(state, settings.max_record_bytes)
    return Outgoing(settings.topic(ALGORITHM_STATE), encode_key(state.key), encoded)


async def open_groups(settings: KafkaSettings, algorithm: str) -> list[Group]:
    """Groups as they are remembered, with their members; waits count from now."""
    values = await remembered(settings, algorithm)
    states = {name: _group_state(name, value) for name, value in values.items()}
    places = {place for state in states.values() for place in state.members}
    members = await _members(settings, places)
    lost = len(places) - len(members)
    if lost:
        logger.error("%d trajectories of open groups are no longer in Kafka: their groups will be closed without", lost)
    now = time.monotonic()
    groups: list[Group] = []
    for group_id, state in states.items():
        found = [members[place] for place in state.members if place in members]
        if found or state.given:
            own = {trajectory.rollout_id: (record, trajectory) for record, trajectory in found}
            groups.append(Group(group_id, now, own, state.given, state.missing))
    return groups


async def _members(
    settings: KafkaSettings, places: set[tuple[int, int]]
) -> dict[tuple[int, int], tuple[Record, Trajectory]]:
    """Trajectories by partition and offset; those that Kafka no longer has are left out."""
    wanted: Mapping[int, set[int]] = defaultdict(set)
    for partition, offset in places:
        wanted[partition].add(offset)
    found: dict[tuple[int, int], tuple[Record, Trajectory]] = {}
    backoff = Backoff(logger)
    for partition, offsets in wanted.items():
        while True:
            try:
                found |= await _read(settings, TopicPartition(settings.topic(TRAJECTORIES), partition), offsets)
                break
            except (KafkaError, TimeoutError) as error:
                await backoff.wait(f"reading members of open groups again: {error!r}")
    return found


async def _read(
    settings: KafkaSettings, tp: TopicPartition, offsets: set[int]
) -> dict[tuple[int, int], tuple[Record, Trajectory]]:
    found: dict[tuple[int, int], tuple[Record, Trajectory]] = {}
    async with connected(settings) as consumer:
        consumer.assign([tp])
        consumer.seek(tp, min(offsets))
        while await consumer.position(tp) <= max(offsets):
            for record in (await fetch(settings, consumer, tp, timeout_ms=_POLL_MS)).get(tp, []):
                if record.offset not in offsets:
                    continue
                try:
                    found[tp.partition, record.offset] = (record, decode(Trajectory, value_of(record)))
                except InvalidEvent as error:
                    logger.error("%s-%d offset %d is no trajectory: %s", tp.topic, tp.partition, record.offset, error)
    return found


def _is_tombstone(record: Record) -> bool:
    return record.value is None and not isinstance(record, Undecodable)


def _value(record: Record) -> Any:
    where = f"{record.topic}-{record.partition} offset {record.offset}"
    try:
        return decode(AlgorithmState, value_of(record)).value
    except InvalidEvent as error:
        return Unreadable(f"{where}: {error}")


def _group_state(group_id: str, value: Any) -> GroupState:
    """Of one that cannot be read nobody knows whether it was given: its members are given to nobody a second time."""
    if state := GroupState.parse(value):
        return state
    why = value.why if isinstance(value, Unreadable) else "no state of a group"
    logger.error("what is remembered of group %s cannot be read: nothing more is given of it: %s", group_id, why)
    return GroupState(given=True, missing=MAX_GROUP_SIZE)

"""Prints records of a topic so that a person can read them: long lists shortened, one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from rich.markup import escape

from fulgurite.infra.cli_common import console
from fulgurite.infra.topics import partitions_of
from fulgurite.producers.kafka import connection_options
from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import Fetched, fetch
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import TOPICS, Topic

_POLL_MS = 500
_MAX_LIST = 8
_MAX_TEXT_CHARS = 160

Wanted = Callable[[Fetched], bool]


async def tail_topic(
    settings: KafkaSettings, name: str, *, count: int, follow: bool, rollout: str = "", full: bool = False
) -> None:
    """The newest `count` records over all partitions, by time; then new ones if `follow`."""
    topic = _topic(settings, name)
    partitions = await partitions_of(settings, topic)
    consumer: AIOKafkaConsumer = AIOKafkaConsumer(
        **connection_options(settings), isolation_level="read_committed", enable_auto_commit=False
    )
    await consumer.start()
    try:
        parts = [TopicPartition(settings.topic(topic), number) for number in range(partitions)]
        consumer.assign(parts)
        wanted = _wanted(rollout)
        for record in await _newest(settings, consumer, parts, count, wanted, everything=bool(rollout)):
            _print(record, full)
        while follow:
            for records in (await fetch(settings, consumer, timeout_ms=_POLL_MS)).values():
                for record in filter(wanted, records):
                    _print(record, full)
    finally:
        await consumer.stop()


def _topic(settings: KafkaSettings, name: str) -> Topic:
    for topic in TOPICS:
        if name in (topic.name, settings.topic(topic)):
            return topic
    raise SettingsError(f"there is no topic {name}; known ones: {', '.join(topic.name for topic in TOPICS)}")


async def _newest(
    settings: KafkaSettings,
    consumer: AIOKafkaConsumer,
    parts: list[TopicPartition],
    count: int,
    wanted: Wanted,
    *,
    everything: bool,
) -> list[Fetched]:
    """Reads up to the ends as they are now. Keeps at most twice `count` records in memory."""
    begin, end = await consumer.beginning_offsets(parts), await consumer.end_offsets(parts)
    for part in parts:
        consumer.seek(part, begin[part] if everything else max(begin[part], end[part] - count))
    found: list[Fetched] = []
    behind = {part for part in parts if end[part] > begin[part]}
    while behind:
        for records in (await fetch(settings, consumer, timeout_ms=_POLL_MS)).values():
            found += filter(wanted, records)
            if len(found) > 2 * count:
                found = sorted(found, key=_by_time)[-count:] if count else []
        behind = {part for part in behind if await consumer.position(part) < end[part]}
    return sorted(found, key=_by_time)[-count:] if count else []


def _by_time(record: Fetched) -> tuple[int, int]:
    return record.timestamp, record.offset


def _wanted(rollout: str) -> Wanted:
    if not rollout:
        return lambda record: True
    key, inside = rollout.encode(), json.dumps(rollout).encode()
    return lambda record: record.key == key or inside in (record.value or b"")


def _print(record: Fetched, full: bool) -> None:
    value = _decoded(record)
    key = (record.key or b"").decode(errors="replace")
    if full:
        where = {"partition": record.partition, "offset": record.offset, "timestamp": record.timestamp, "key": key}
        console.out(json.dumps(where | {"value": value}, ensure_ascii=False), highlight=False)
        return
    at = datetime.fromtimestamp(record.timestamp / 1000).strftime("%H:%M:%S.%f")[:-3]
    text = value if isinstance(value, str) else json.dumps(_shortened(value), ensure_ascii=False)
    headers = "".join(f" {name}={_header(data)}" for name, data in record.headers)
    console.print(
        f"[dim]{at} {record.partition}@{record.offset}[/] [bold]{escape(key)}[/] {escape(text)}"
        f"[dim]{escape(headers)}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _header(data: bytes | None) -> str:
    """Kafka's headers may have no value."""
    return "null" if data is None else data.decode(errors="replace")[:80]


def _decoded(record: Fetched) -> Any:
    data = record.value
    if isinstance(record, Undecodable):
        return f"(cannot be decoded: {record.why}) {(data or b'')[:_MAX_TEXT_CHARS]!r}"
    if data is None:
        return "(no value: a tombstone)"
    try:
        found = json.loads(data)
        json.dumps(_shortened(found))
    except (ValueError, RecursionError):  # nested deeper than Python follows
        return f"({len(data)} bytes) {data[:_MAX_TEXT_CHARS]!r}"
    return found


def _shortened(value: Any) -> Any:
    """Without empty fields; long lists and texts cut, with their length."""
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items() if item not in ("", None, [], {})}
    if isinstance(value, list):
        short = [_shortened(item) for item in value[:_MAX_LIST]]
        return [*short, f"… {len(value)} in all"] if len(value) > _MAX_LIST else short
    if isinstance(value, str) and len(value) > _MAX_TEXT_CHARS:
        return f"{value[:_MAX_TEXT_CHARS]}… ({len(value)} characters)"
    return value

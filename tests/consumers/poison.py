"""Records that no reader can decode, and a broker's disk that gives back other bytes than it got."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer import message_accumulator, producer
from aiokafka.record import default_records

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import Topic

BAD_NAME = b"\xff\xfe"

Headers = list[tuple[str, bytes]]


class _NotUtf8(str):
    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return BAD_NAME


POISON: Headers = [(_NotUtf8("x"), b"v")]
"""Headers that are sent as they are by a producer within `plain_builder`."""


@contextmanager
def plain_builder() -> Generator[None]:
    """aiokafka's builder of batches that is written in Python, and so encodes a header's name as that says."""
    with pytest.MonkeyPatch.context() as patch:
        builder = getattr(default_records, "_DefaultRecordBatchBuilderPy")  # noqa: B009
        for module in (message_accumulator, producer):
            patch.setattr(module, "DefaultRecordBatchBuilder", builder)
        yield


def batch(
    records: Sequence[tuple[bytes | None, bytes | None, Headers]],
    base: int = 0,
    codec: int = 0,
    sender: int = -1,
    transactional: bool = False,
) -> bytes:
    """As a broker would give it, from offset `base` on."""
    builder: Any = getattr(default_records, "_DefaultRecordBatchBuilderPy")(  # noqa: B009
        2, codec, transactional, sender, 0, 0, 1 << 20
    )
    for number, (key, value, headers) in enumerate(records):
        assert builder.append(number, 1_000 + number, key, value, headers)
    return base.to_bytes(8, "big") + bytes(builder.build())[8:]


async def send_poison(
    client: AIOKafkaProducer, topic: str, partition: int, value: bytes, key: bytes | None = None
) -> int:
    """Its offset. Within `plain_builder`."""
    sent = await client.send_and_wait(topic, value, key=key, partition=partition, headers=POISON)
    return sent.offset


async def poison(kafka: KafkaSettings, topic: Topic | str, value: bytes = b"{}", key: bytes | None = b"k") -> None:
    """A record that nobody can decode, to each partition of this topic, ours or the one of this name."""
    name = topic if isinstance(topic, str) else kafka.topic(topic)
    with plain_builder():
        async with AIOKafkaProducer(**connection_options(kafka)) as client:
            for partition in await client.partitions_for(name):
                await send_poison(client, name, partition, value, key)


@contextmanager
def rotten(segment: Path, text: bytes) -> Generator[None]:
    """Where `text` lies in a file of the broker's log, one bit is another meanwhile."""
    at = segment.read_bytes().index(text)
    _flip(segment, at)
    try:
        yield
    finally:
        _flip(segment, at)


def _flip(segment: Path, at: int) -> None:
    with segment.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))

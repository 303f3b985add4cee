"""What a consumer group has committed, asked from outside the group. One try; knows no policy for the next."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from aiokafka.errors import GroupLoadInProgressError
from aiokafka.structs import OffsetAndMetadata, TopicPartition


class Admin(Protocol):
    """What is needed of aiokafka's admin client."""

    async def list_consumer_group_offsets(
        self,
        group_id: str,
        group_coordinator_id: int | None = None,
        partitions: list[TopicPartition] | None = None,
    ) -> dict[TopicPartition, OffsetAndMetadata]: ...


async def committed(
    admin: Admin, group: str, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The offsets of these partitions, without those that have none. Raises KafkaError: try again.

    After a broker's start the group's coordinator is loading and answers with an empty list and a top-level error, at
    which aiokafka does not look. Partitions asked for by name are all in a real answer, those without an offset as -1;
    an answer that lacks one is therefore none. Taken for "no offsets" it would have work done twice.
    """
    found = await admin.list_consumer_group_offsets(group, partitions=list(partitions))
    missing = set(partitions) - set(found)
    if missing:
        raise GroupLoadInProgressError(f"no answer for {len(missing)} of {len(partitions)} partitions of {group}")
    return {partition: at for partition, at in found.items() if at.offset >= 0}

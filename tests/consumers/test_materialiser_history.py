"""Looks at many partitions."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError

from fulgurite.consumers.materialiser.history import AT_ONCE, History, Incarnation, Look
from fulgurite.schemas.settings import KafkaSettings

PLACES = {TopicPartition("spans", number): 100 + number for number in range(3 * AT_ONCE)}


class FarHistory(History):
    """Its broker answers after a while."""

    def __init__(self, gone: TopicPartition | None = None) -> None:
        super().__init__(KafkaSettings())
        self.gone = gone
        self.at_work = self.most = 0

    async def _incarnations(self, topics: Collection[str]) -> dict[TopicPartition, Incarnation]:
        return {tp: Incarnation("id", epoch=1, leader=0) for tp in PLACES if tp.topic in topics}

    async def _begins(self, known: Mapping[TopicPartition, Incarnation]) -> dict[TopicPartition, list[int]]:
        return {tp: [50] for tp in known}

    async def _times(self, tp: TopicPartition, leader: int, at: int) -> dict[int, int]:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await asyncio.sleep(0.01)
            if tp == self.gone:
                raise KafkaConnectionError(str(tp))
            return {at: 1_000 + at}
        finally:
            self.at_work -= 1


async def test_many_partitions_are_looked_at_together_up_to_a_bound() -> None:
    history = FarHistory()
    looks = await history.look(PLACES)
    assert history.most == AT_ONCE
    expected = {tp: Look(Incarnation("id", 1, 0), {50: 1_050, at: 1_000 + at}) for tp, at in PLACES.items()}
    assert looks == expected


async def test_a_broker_that_goes_away_ends_the_whole_look() -> None:
    history = FarHistory(gone=TopicPartition("spans", 1))
    with pytest.raises(KafkaConnectionError, match="partition=1"):
        await history.look(PLACES)
    assert history.at_work == 0

"""What the group's answer to a commit means."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError, RequestTimedOutError

from fulgurite.consumers.materialiser.offsets import Lost, Offsets

A, B = TopicPartition("spans", 0), TopicPartition("spans", 1)


@dataclass
class Committing:
    """A consumer with one partition, whose commits fail with an error."""

    error: Exception | None = None
    commits: list[dict[TopicPartition, int]] = field(default_factory=list[dict[TopicPartition, int]])

    def assignment(self) -> set[TopicPartition]:
        return {A}

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        if self.error is not None:
            raise self.error
        self.commits.append(offsets)


async def test_a_claim_is_a_commit() -> None:
    consumer = Committing()
    await Offsets(consumer).claim({A: 7})
    assert consumer.commits == [{A: 7}]


@pytest.mark.parametrize("error", [CommitFailedError("new generation"), IllegalStateError("not assigned")])
async def test_a_refused_claim_means_that_the_partitions_are_lost(error: KafkaError) -> None:
    with pytest.raises(Lost):
        await Offsets(Committing(error)).claim({A: 7})


async def test_a_partition_that_is_not_assigned_cannot_be_claimed() -> None:
    consumer = Committing()
    with pytest.raises(Lost):
        await Offsets(consumer).claim({A: 7, B: 3})
    assert consumer.commits == []


async def test_a_broker_that_does_not_answer_says_nothing_about_the_group() -> None:
    with pytest.raises(RequestTimedOutError):
        await Offsets(Committing(RequestTimedOutError())).claim({A: 7})


async def test_what_is_finished_is_committed_for_our_partitions_and_may_fail() -> None:
    consumer = Committing()
    await Offsets(consumer).finish({A: 9, B: 4})
    await Offsets(consumer).finish({B: 5})
    assert consumer.commits == [{A: 9}]
    await Offsets(Committing(CommitFailedError("later"))).finish({A: 10})

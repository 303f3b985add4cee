"""What a batch looks like on Kafka: nothing is too large to be sent in some form."""

from __future__ import annotations

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas import topics
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import HEADER_BYTES, HEADER_OFFSET, MAX_KEY_BYTES, DeadLetter
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.trajectories import Trajectory, TrajectoryReward
from fulgurite.streams.assembler.outputs import records
from fulgurite.streams.assembler.rollouts import Batch, Pending
from fulgurite.streams.transactions import Transactions
from tests.streams.assembler_bus import connected
from tests.streams.assembler_records import finished

BOUND = 32_768
END = Pending(finished("r1"), TopicPartition("rollouts", 0), 0)


@pytest.mark.parametrize(
    ("rewards", "metadata"),
    [(1_000, {}), (1, {f"note-{n}": "x" * 1_000 for n in range(40)})],
)
def test_a_trajectory_whose_rewards_alone_are_too_large_is_sent_without_them(
    rewards: int, metadata: dict[str, str]
) -> None:
    trajectory = Trajectory(
        rollout_id="r1",
        group_id="g1",
        status="succeeded",
        partial="deadline",
        rewards=[TrajectoryReward(reward_id=f"reward-{n}", name="reward", value=n) for n in range(rewards)],
        reward=7.0,
        metadata=dict(metadata),
    )
    [sent] = records(Batch([trajectory], [END], [], {}), KafkaSettings(max_record_bytes=BOUND))
    found = decode(Trajectory, sent.value)
    assert (found.partial, found.reward, found.rewards, found.metadata) == ("deadline,too_large", 7.0, [], {})
    assert sent.key == b"g1"


@pytest.mark.parametrize(("spare", "kept"), [(0, True), (-1, False)])
def test_a_dead_letters_key_counts(spare: int, kept: bool) -> None:
    key = b"k" * 1_000
    value = b"v" * (BOUND - HEADER_BYTES - len(key) - spare)
    letter = DeadLetter("spans", 0, 1, "assembler", "not_json", "why", key, value)
    [sent] = records(Batch([], [], [letter], {}), KafkaSettings(max_record_bytes=BOUND))
    assert sent.value == (value if kept else b"")


async def test_a_late_record_with_a_key_beyond_every_bound_ends_nothing(kafka_settings: KafkaSettings) -> None:
    """Compressed, it is within the broker's bound; as a dead letter it would be within nobody's."""
    key = b"k" * (kafka_settings.max_record_bytes + (1 << 20))
    huge = DeadLetter("spans", 0, 1, "assembler", "r" * 100_000, "m" * 100_000, key, b"v" * 9_000_000)
    small = DeadLetter("spans", 0, 2, "assembler", "late", "why", b"k" * MAX_KEY_BYTES, b"value")
    transactions = Transactions(kafka_settings, "poison", "poison")
    await transactions.start()
    try:
        tp = TopicPartition(kafka_settings.topic(topics.SPANS), 0)
        await transactions.committed([tp])
        await transactions.commit(
            records(Batch([], [], [huge, small], {}), kafka_settings), {tp: OffsetAndMetadata(1, "")}
        )
    finally:
        await transactions.close()
    async with connected(kafka_settings) as bus:
        sent = {
            dict(each.headers)[HEADER_OFFSET]: (each.key, each.value) for each in await bus.read(topics.DEAD_LETTERS)
        }
    assert sent == {b"1": (None, b""), b"2": (small.key, b"value")}

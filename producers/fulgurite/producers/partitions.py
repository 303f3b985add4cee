"""Which partition a key belongs to: Kafka's murmur2, as the Java client does it.

The hash is Python here and costs more than encoding a small event; a rollout's events come close together, so the last
keys' are remembered. Bounded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from aiokafka.partitioner import murmur2

REMEMBERED_KEYS = 1 << 16


@lru_cache(maxsize=REMEMBERED_KEYS)
def _hash(key: bytes) -> int:
    return murmur2(key) & 0x7FFFFFFF


def partition_of(key: bytes, partitions: int) -> int:
    """Where Kafka's default partitioner puts this key."""
    return _hash(key) % partitions


def partitioner(key: bytes | None, every: Sequence[int], available: Sequence[int]) -> int:
    """For AIOKafkaProducer. `every`: the topic's partitions, in order; records without a key go where a leader is."""
    if key is None:
        return random.choice(available or every)
    return every[partition_of(key, len(every))]

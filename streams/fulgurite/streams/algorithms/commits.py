"""Commits of an algorithm's records with the offsets behind what it read, of partitions added meanwhile, too.

Nobody has committed offsets of a partition that is added while this process runs: its predecessors are fenced, and knew
of none. Where somebody has all the same (the broker told this process of fewer partitions than there were), what was
read of it since its beginning was read before: the process ends, and its next start goes on from those offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas.errors import StartError
from fulgurite.streams.transactions import Outgoing, Transactions


class Commits:
    """One after the other."""

    def __init__(self, transactions: Transactions, known: Iterable[TopicPartition]) -> None:
        """`known`: the partitions whose committed offsets were asked for, and are read on from there."""
        self._transactions = transactions
        self._known = set(known)

    async def commit(self, records: Sequence[Outgoing], offsets: Mapping[TopicPartition, int]) -> None:
        """Returns when it is committed."""
        if added := offsets.keys() - self._known:
            before = await self._transactions.committed(added)
            if read := sorted(tp for tp, at in before.items() if at is not None):
                names = ", ".join(f"{tp.topic}-{tp.partition}" for tp in read)
                raise StartError(
                    f"{names}: read before, but not told of at the start; start again to go on behind that"
                )
            self._known |= added
        await self._transactions.commit(records, {tp: OffsetAndMetadata(at, "") for tp, at in offsets.items()})

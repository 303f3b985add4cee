"""The trainer's transactions: what goes into each, and the marker that goes beside the offsets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas.topics import RESOURCES, ROLLOUTS, TRAINING
from fulgurite.schemas.training import RolloutsDecided, RunFinished, RunStarted, TrainingStep
from fulgurite.streams.trainer.checkpoints import Checkpoint
from fulgurite.streams.trainer.events import Marker, outgoing, version_event
from fulgurite.streams.trainer.ledger import LedgerEvent, in_parts
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.tasks import group_records
from fulgurite.streams.transactions import Outgoing, Transactions


class Publishing:
    """Every method is one transaction and returns when it is committed."""

    def __init__(self, plan: Plan, transactions: Transactions, claimed: Iterable[TopicPartition]) -> None:
        """`claimed`: partitions that `transactions` has been asked about."""
        self._plan = plan
        self._kafka = plan.settings.kafka
        self._transactions = transactions
        self._claimed = set(claimed)

    @property
    def lineage(self) -> str:
        return self._transactions.lineage

    async def confirm(self) -> None:
        """Nothing. Raises Fenced where this process does not own the run any more."""
        await self._transactions.confirm()

    async def version(
        self, checkpoint: Checkpoint, event: RunStarted | TrainingStep, groups: range, dead_letters: list[Outgoing]
    ) -> None:
        """A version and all that belongs to it: its announcement, what it was made of, what to do next, its offsets."""
        state = checkpoint.state
        model = self._plan.start_model.name if self._plan.start_model else ""
        announced = version_event(checkpoint, model)
        records = [
            outgoing(self._kafka, RESOURCES, announced.resource, announced),
            *self._told(event),
            *self._queued(groups),
            *dead_letters,
        ]
        marker = Marker(version=state.version, step=state.step, asked=state.asked)
        await self._commit(records, self._offsets(state.offsets, marker))

    async def more(
        self,
        marker: Marker,
        offsets: Mapping[int, int],
        groups: range,
        others: list[Outgoing],
        buried: Mapping[int, int] | None = None,
        event: RunStarted | RolloutsDecided | None = None,
    ) -> None:
        """Between versions: groups in place of dropped ones, dead letters and dropped rollouts that fill up. Offsets
        stay as they were. `buried`: by partition, below which offset dead letters are on the log."""
        told = self._told(event) if event else []
        await self._commit([*told, *self._queued(groups), *others], self._offsets(offsets, marker, buried))

    async def finished(
        self, event: RunFinished, marker: Marker, offsets: Mapping[int, int], dead: list[Outgoing]
    ) -> None:
        await self._commit([*self._told(event), *dead], self._offsets(offsets, marker))

    async def _commit(self, records: list[Outgoing], offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        """A partition that was added meanwhile needs no claim: a predecessor that wakes up finds a stranger's stamp on
        the others. What stands on it now only tells, should an answer be lost, whether this commit has happened."""
        if added := offsets.keys() - self._claimed:
            await self._transactions.committed(added)
            self._claimed |= added
        await self._transactions.commit(records, offsets)

    def _told(self, event: RunStarted | LedgerEvent) -> list[Outgoing]:
        """On `training`."""
        records = [event] if isinstance(event, RunStarted) else in_parts(event, self._kafka.max_record_bytes)
        return [outgoing(self._kafka, TRAINING, record.run_id, record) for record in records]

    def _queued(self, groups: range) -> list[Outgoing]:
        tasks = self._plan.tasks
        if tasks is None:
            return []
        return [
            outgoing(self._kafka, ROLLOUTS, queued.rollout_id, queued)
            for index in groups
            for queued in group_records(self._plan.trainer, self._plan.shape, tasks, index)
        ]

    def _offsets(
        self, offsets: Mapping[int, int], marker: Marker, buried: Mapping[int, int] | None = None
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        below = buried or {}
        return {
            TopicPartition(self._plan.topic, number): OffsetAndMetadata(
                offset, marker.model_copy(update={"buried": below.get(number, 0)}).model_dump_json()
            )
            for number, offset in offsets.items()
        }

"""Steps 1 and 2 of the assembler's contract (service.py): where a restart begins to read again."""

from __future__ import annotations

import logging

from fulgurite.schemas.settings import Settings
from fulgurite.streams.assembler.assembly import Assembly
from fulgurite.streams.assembler.inputs import Inputs
from fulgurite.streams.assembler.offsets import DataPartition, RolloutsPartition
from fulgurite.streams.assembler.waits import Waits
from fulgurite.streams.transactions import Hook, Transactions

logger = logging.getLogger(__name__)


async def restore(settings: Settings, inputs: Inputs, transactions: Transactions, hook: Hook) -> Assembly:
    """An assembly with nothing in it yet, and the readers at the positions from which it is filled."""
    rollouts, spans, rewards = await inputs.partitions()
    await transactions.start()  # 1.
    hook("fenced")
    everything = [*rollouts, *spans, *rewards]
    committed = await transactions.committed(everything)  # 2.
    begins, ends = await inputs.begin_offsets(everything), await inputs.end_offsets(everything)
    for tp, at in committed.items():
        if at is not None and begins[tp] > at.offset:
            logger.error("%s-%d: %d records expired unread", tp.topic, tp.partition, begins[tp] - at.offset)
    events = [RolloutsPartition.restored(tp, committed[tp], begins[tp]) for tp in rollouts]
    calls = [DataPartition.restored(tp, committed[tp], begins[tp]) for tp in spans]
    values = [DataPartition.restored(tp, committed[tp], begins[tp]) for tp in rewards]
    for part in (*events, *calls, *values):
        # A log cut off before its committed offset (a broker that lost its disk) must not be waited for.
        part.read_to = min(part.read_to, ends[part.tp])
    for client, parts in ((inputs.rollouts, events), (inputs.data, [*calls, *values])):
        client.assign([part.tp for part in parts])
        for part in parts:
            client.seek(part.tp, part.position)
    return Assembly(
        events,
        calls,
        values,
        max_open_rollouts=settings.assembler.max_open_rollouts,
        orphan_seconds=settings.assembler.orphan_seconds,
        keep_spans=settings.assembler.output == "attempts",
        waits=Waits(
            wait_seconds=settings.assembler.otlp_wait_seconds,
            settle_seconds=settings.assembler.otlp_settle_seconds,
        ),
    )

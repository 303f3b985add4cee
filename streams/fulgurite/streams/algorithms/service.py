"""An algorithm at work: each input's events are published exactly once, in the order of the log.

    its topic ──► read ──► groups ──► function, `algorithm.concurrency` at once ──► done, from the oldest on
                              ▲                                                            │
                              │                                        ┌────────── one transaction ──────────┐
                       algorithm_state ◄───────────────────────────────│ events, dead letters, what is to be │
                        (open groups)                                  │ remembered, consumed offsets        │
                                                                       └─────────────────────────────────────┘

consumes: the topic it reads           produces: any event a program may write, trajectories, dead_letters
waits for: the function; a full group  unblocked by: its end, algorithm.timeout_seconds; group_deadline_seconds

The contract. The numbers are in the code: 1 and 2 here, 3 to 5 in program.py.
 1. InitProducerId with the transactional id of the algorithm's name: a predecessor can commit nothing any more.
 2. Committed offsets and open groups are read; on the first start the offsets are those of `--from`, committed at once.
    Crash in 1 or 2: nothing was written, or the offsets to begin with.
 3. Records are read on; the function is called with what is chosen of them.
    Crash: the same records are read and given to the function again. What it did elsewhere (asked a model, wrote a
    file) it does again; what it yielded was not published.
 4. The oldest inputs that are done are taken: their events in order, the groups as they then stand, and the offsets
    behind them.
 5. One transaction with all of that.
    Crash before the commit: as 3. After: the next start reads offsets (2) that say so.
    An answer lost on the way: Transactions (streams/transactions.py) asks the broker how it ended.

A function that raises is tried algorithm.tries times; then its input is a dead letter, or the process ends
(algorithm.on_error). An algorithm does not read what it wrote itself (HEADER_ALGORITHM).

What Kafka's retention took before it was read is lost: the log says what, and the next start goes on behind it.
Partitions that are added meanwhile are read from their beginning, and their offsets are in 5 from then on (commits.py).

Bounds: those of program.py, and algorithm.max_open_groups groups. Does not know what the function does.
"""

from __future__ import annotations

import asyncio
import logging

from aiokafka.structs import OffsetAndMetadata

from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import Settings
from fulgurite.streams.algorithms.definition import Algorithm
from fulgurite.streams.algorithms.groups import Groups
from fulgurite.streams.algorithms.memory import WHEN_GONE, Start, open_groups, still_there
from fulgurite.streams.algorithms.program import Program
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.transactions import Hook, Transactions, no_hook

logger = logging.getLogger(__name__)


def main(settings: Settings, algorithm: Algorithm, start: Start) -> int:
    """`fulgurite algorithm`."""
    return run_service(algorithm.name, settings.log, lambda stop: serve(settings, algorithm, start, stop))


async def serve(
    settings: Settings, algorithm: Algorithm, start: Start, stop: asyncio.Event, hook: Hook = no_hook
) -> None:
    """Runs until `stop`, which leaves what a crash leaves: nothing half done. `hook` is told each step by name."""
    name = f"{settings.kafka.topic_prefix}algorithm.{algorithm.name}"
    transactions = Transactions(settings.kafka, transactional_id=name, group=name, hook=hook)
    reader = TrajectoryReader(settings.kafka, settings.kafka.topic(algorithm.topic), WHEN_GONE)
    running = asyncio.ensure_future(_run(settings, algorithm, start, reader, transactions, hook))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        stopping.cancel()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await reader.close()
        await transactions.close()


async def _run(
    settings: Settings,
    algorithm: Algorithm,
    start: Start,
    reader: TrajectoryReader,
    transactions: Transactions,
    hook: Hook,
) -> None:
    await transactions.start()  # 1.
    await reader.start()
    hook("fenced")
    committed = await transactions.committed(reader.partitions)  # 2.
    offsets = {tp.partition: at.offset for tp, at in committed.items() if at is not None}
    groups = Groups(settings.algorithm.max_open_groups, settings.algorithm.group_deadline_seconds)
    if offsets:
        offsets = await still_there(reader, offsets)
        for group in await open_groups(settings.kafka, algorithm.name) if algorithm.reads == "groups" else []:
            groups.restore(group)
    else:
        offsets = await start.offsets(settings.kafka, reader.partitions)
        await transactions.commit([], {tp: OffsetAndMetadata(offsets[tp.partition], "") for tp in reader.partitions})
    await reader.seek(offsets)
    hook("restored")
    logger.info(
        "ready: %s reads %s from %s; %d groups open", algorithm.name, reader.partitions[0].topic, offsets, len(groups)
    )
    program = Program(settings, algorithm, groups, reader, transactions, hook)
    try:
        await program.run()
    finally:
        await program.close()

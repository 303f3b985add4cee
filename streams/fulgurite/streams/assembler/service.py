"""The assembler: one trajectory per rollout, on its `finished` event, exactly once.

     rollouts ──► read ──► finished ──► end offsets of all ─┐
                   │                    spans, rewards      │ barrier        ┌────────── one transaction ─────────┐
                   ▼                                        ▼                │ trajectories, dead letters,        │
              open rollouts ◄── spans, rewards ──► positions passed them ──► │ offsets of rollouts, spans, rewards│
                                                                             └────────────────────────────────────┘

| task    | consumes         | waits for                      | unblocked by                                       |
|---------|------------------|--------------------------------|----------------------------------------------------|
| events  | rollouts         | fewer than MAX_PENDING pending | the data task passing barriers                     |
| data    | spans, rewards   | room for dead letters          | a transaction                                      |
| commits | open rollouts    | a barrier passed, or a second  | the broker; it is waited for without limit, loudly |
| otlp    | what the trans-  | the translator, for rollouts   | its commits, or otlp_wait_seconds                  |
|         | lator committed  | that lack a reward             |                                                    |

The barrier. A runner's spans and rewards are acknowledged before it reports the end of the attempt, and only then is
`finished` published. So when `finished` is read, all of it lies before the ends of `spans` and `rewards` asked for now.
Once they have been read that far the rollout is complete: exactly, with no grace period.

The second barrier. A reward that came as OTLP is on `rewards` only when the translator has been there. So where there
is a translator, a succeeded rollout that has passed the first barrier without a reward waits until the translator has
committed the ends of otlp_spans, and `rewards` was read to its ends of after that (waits.py, translated.py), for
otlp_wait_seconds at most. Others do not wait for it.

Exactly once. The numbers are in the code.
 1. InitProducerId with the transactional id that names all partitions: a predecessor can commit nothing any more, and
    what it left open is aborted before the call returns.
    Crash before or after: nothing was written.
 2. Committed offsets are read: the oldest records still needed, and marks of what was dealt with (offsets.py).
 3. Events from replay_from to read_to are read again: which rollouts are open, which have ended.
 4. Spans and rewards from needed_from to read_to are read again: those of open rollouts are kept.
    Crash in 2 to 4: nothing was written; the next start does the same again.
 5. Events, spans and rewards are read on; barriers are set and passed.
    Crash: what was read since the last commit is read again from there, and barriers are set anew, at or behind those
    of before; who waited for the translator begins to wait anew. So what is decided later is decided on more, never on
    less, and nothing is decided before 7.
 6. A batch is taken: trajectories in the order of `rollouts` (but past those that wait for the translator), dead
    letters, and the offsets that say so.
    Crash: the same records are in a next batch.
 7. Batch and offsets are written in one transaction.
    Crash before the broker has the commit: it is aborted, by the next start (1) or its timeout; as 6.
    Crash after: the next start reads offsets (2) that say that the batch exists.
    Broker lost in between: Transactions (see there) finds out which of the two it was, and tries again if needed.
 8. The next batch. The state after 6 is the state after 7, because 7 only ends committed or with this process.

What this rests on: the committed offsets. When they are lost (stopped for longer than the brokers'
offsets.retention.minutes, a week by default) it starts from the beginning of the logs and emits again what they hold.

What becomes a dead letter here (stage `assembler`) is only what the materialiser cannot see: `late` (its rollout's
trajectory was emitted before it came; spans of superseded attempts are just not used) and `unknown_rollout` (nobody
announced its rollout within orphan_seconds, and `rollouts` had been read to its end after that); one for each line of
the rollout, with the line's number, as the materialiser's; and `not_assembled`, a `finished` whose trajectory could not
be made of its records (building.py). Records that are not
spans, rewards or events, or that nobody can decode, are counted and logged: the materialiser reads the same bytes and
keeps them with the reason.
Spans without a rollout_id are plain traces and no concern of this service, nor are rewards given to a trajectory that
exists (HEADER_AFTER_END).

With assembler.output = attempts the trajectories go to `attempts`, with the spans of the attempt that counts: the
aggregator finds rewards in them and publishes the trajectories (streams/algorithms/aggregator). Switching over loses
and doubles nothing, as each rollout's trajectory is written once, here or there.

Does not know groups, advantages or staleness: that is the trainer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from fulgurite.producers.raw import Undecodable
from fulgurite.producers.reading import Records, fetch, value_of
from fulgurite.producers.service import run_service
from fulgurite.schemas.codec import decode_union
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.rewards import HEADER_AFTER_END
from fulgurite.schemas.rollouts import ROLLOUT_EVENT
from fulgurite.schemas.settings import Settings
from fulgurite.streams.assembler.assembly import MAX_UNSENT_BYTES, Assembly
from fulgurite.streams.assembler.inputs import POLL_MS, POLL_RECORDS, Inputs
from fulgurite.streams.assembler.lines import attempts_of
from fulgurite.streams.assembler.metrics import Metrics
from fulgurite.streams.assembler.outputs import records
from fulgurite.streams.assembler.restart import restore
from fulgurite.streams.assembler.rollouts import Held, Pending
from fulgurite.streams.assembler.translated import Translator, Watch
from fulgurite.streams.transactions import Hook, Transactions, no_hook

logger = logging.getLogger(__name__)

GROUP = "assembler"

MAX_PENDING = 20_000
"""Ended rollouts that wait for their barrier: a few kilobytes each."""
MAX_BATCH = 100
"""Trajectories of one transaction: encoding them keeps the event loop for about a tenth of a second."""
MAX_BATCH_READ_AGAIN = 8
"""The same, when records of them must be read again: their size is not known before."""

_IDLE_COMMIT_SECONDS = 1.0
"""How often offsets are committed when there is nothing else to say."""
_REFRESH_SECONDS = 3_600.0
"""How often unchanged offsets are committed, too: Kafka forgets an offset that nobody commits for a week."""
_LOOKS_REST = 4
"""So many times as long as a look at all that wait took, nobody looks again: it is told with every fetch that something
has changed, and of 20,000 that wait for the translator a look takes milliseconds."""
_ORPHAN_CHECK_SECONDS = 1.0
_REPORT_SECONDS = 10.0
_STOP_SECONDS = 2.0


def main(settings: Settings) -> int:
    return run_service("assembler", settings.log, lambda stop: serve(settings, stop))


async def serve(settings: Settings, stop: asyncio.Event, hook: Hook = no_hook) -> None:
    """Runs until `stop`. `hook` is told each step by name as it is reached (crash tests end the process in it)."""
    inputs = Inputs(settings.kafka)
    group = f"{settings.kafka.topic_prefix}{GROUP}"
    transactions = Transactions(settings.kafka, f"{group}-all", group, hook=hook)
    running = asyncio.ensure_future(_run(settings, inputs, transactions, stop, hook))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await asyncio.wait({running}, timeout=_STOP_SECONDS)
        if running.done():
            running.result()
    finally:
        stopping.cancel()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await transactions.close()
        await inputs.close()


async def _run(settings: Settings, inputs: Inputs, transactions: Transactions, stop: asyncio.Event, hook: Hook) -> None:
    await inputs.start()
    state = await restore(settings, inputs, transactions, hook)  # 1., 2.
    assembler = Assembler(settings, inputs, transactions, state, hook)
    try:
        await assembler.replay()  # 3.
        await assembler.begin_watch()
        await _work(assembler, settings, stop)
    finally:
        await assembler.watch.close()


async def _work(assembler: Assembler, settings: Settings, stop: asyncio.Event) -> None:
    logger.info("ready: %d partitions, %d rollouts open", len(assembler.state.rollouts), len(assembler.state.open))
    tasks = [
        asyncio.ensure_future(assembler.commit_batches(stop)),
        asyncio.ensure_future(assembler.read_events()),
        asyncio.ensure_future(assembler.read_data()),
        asyncio.ensure_future(assembler.watch_translator()),
        asyncio.ensure_future(Metrics(assembler.state).serve(settings.assembler)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Assembler:
    """Four tasks around one state."""

    def __init__(
        self, settings: Settings, inputs: Inputs, transactions: Transactions, state: Assembly, hook: Hook
    ) -> None:
        self.state = state
        self._settings = settings
        self._inputs = inputs
        self._transactions = transactions
        self._hook = hook
        self._changed = asyncio.Event()
        self.watch = Watch(Translator(settings.kafka, inputs), inputs, state, self._changed, hook)
        self._committed = asyncio.Event()
        self._check_asked = 0.0
        self._check_ends: dict[TopicPartition, int] = {}
        self._caught_up = 0.0
        """The last time at which `rollouts` was known to have been read to its end."""
        self._reported: Counter[str] = Counter()

    async def replay(self) -> None:
        """3., before anything else is read: a record read again is judged by what the events say."""
        while any(part.replaying for part in self.state.rollouts.values()):
            await self._read_events_once()
        self._hook("replayed")

    async def begin_watch(self) -> None:
        """Before anything is emitted: whether there is a translator."""
        if self._settings.assembler.otlp_wait_seconds:
            await self.watch.first_look()

    async def read_events(self) -> None:
        """5., for lifecycle events."""
        while True:
            while self.state.pending >= MAX_PENDING:
                self._committed.clear()
                await self._committed.wait()
            await self._read_events_once()

    async def read_data(self) -> None:
        """4. and 5., for spans and rewards."""
        while True:
            while self.state.unsent_bytes > MAX_UNSENT_BYTES:
                self._committed.clear()
                await self._committed.wait()
            found = await self._fetch(self._inputs.data)
            for tp, batch in found.items():
                for record in batch:
                    if isinstance(record, Undecodable):
                        self.state.counts["invalid"] += 1
                        continue
                    if any(name == HEADER_AFTER_END for name, _ in record.headers):
                        continue
                    value = record.value or b""
                    attempts, invalid = attempts_of(value)
                    self.state.counts["invalid"] += invalid
                    if attempts:
                        self.state.record(tp, record.offset, record.key, value, attempts)
            for tp in self.state.data:
                self.state.passed(tp, await self._inputs.data.position(tp))
            if found:
                self._hook("data")
            self._changed.set()

    async def watch_translator(self) -> None:
        """5., for what the translator has committed."""
        if self._settings.assembler.otlp_wait_seconds:
            await self.watch.run()
        else:
            await asyncio.Event().wait()

    async def commit_batches(self, stop: asyncio.Event) -> None:
        """6. to 8., at most one transaction in commit_ms; ends after the one under way when `stop` is set."""
        pace = self._settings.assembler.commit_ms / 1000
        last = reported = refreshed = time.monotonic()
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _IDLE_COMMIT_SECONDS)
            self._changed.clear()
            if self.state.replaying:
                continue
            await self._expire()
            begun = time.monotonic()
            ready = self.state.ready(MAX_BATCH)
            worth_it = ready or self.state.unsent
            if not worth_it and time.monotonic() - last < _IDLE_COMMIT_SECONDS:
                await asyncio.sleep(_LOOKS_REST * (time.monotonic() - begun))
                continue
            if time.monotonic() - refreshed > _REFRESH_SECONDS:
                refreshed = time.monotonic()
                self.state.commit_all()
            await asyncio.sleep(max(0.0, last + pace - time.monotonic()))
            last = time.monotonic()
            await self._commit()
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                self._report()
        self._report()

    async def _commit(self) -> None:
        ready = self.state.ready(MAX_BATCH)
        if self.state.spilled(ready):
            ready = ready[:MAX_BATCH_READ_AGAIN]
            await self._read_again(self.state.recall(ready))
        batch = self.state.take(ready)  # 6.
        if batch is None:
            return
        self._hook("taken")
        await self._transactions.commit(records(batch, self._settings.kafka), batch.offsets)  # 7.
        self._hook("done")  # 8.
        self._committed.set()
        if self.state.ready(1):
            self._changed.set()

    async def _expire(self) -> None:
        while spilled := self.state.expire(self._caught_up):
            await self._read_again(spilled)

    async def _read_again(self, held: list[Held]) -> None:
        if not held:
            return
        values = await self._inputs.read_again(held)
        for record in held:
            if not record.done and record.value is None:
                self.state.read_again(record, values[record.tp, record.offset])

    async def _fetch(self, consumer: AIOKafkaConsumer) -> Records:
        return await fetch(self._settings.kafka, consumer, timeout_ms=POLL_MS, max_records=POLL_RECORDS)

    async def _read_events_once(self) -> None:
        found = await self._fetch(self._inputs.rollouts)
        ended: list[Pending] = []
        for tp, batch in found.items():
            for record in batch:
                try:
                    event = decode_union(ROLLOUT_EVENT, "RolloutEvent", value_of(record))
                except InvalidEvent:
                    self.state.counts["invalid"] += 1
                    continue
                pending = self.state.lifecycle(tp, record.offset, event, record.key, record.value)
                if pending is not None:
                    ended.append(pending)
        for tp in self.state.rollouts:
            self.state.passed(tp, await self._inputs.rollouts.position(tp))
        if found:
            self._hook("events")
        if ended:
            # One request for all of them, asked after the last of them was read; they share it.
            barrier = await self._inputs.end_offsets(self.state.data)
            for pending in ended:
                pending.barrier = barrier
            self._changed.set()
        await self._check_orphans()

    async def _check_orphans(self) -> None:
        """Notes that `rollouts` has been read to an end that was asked for after a record's time was up."""
        due, now = self.state.first_due(), time.monotonic()
        if due is not None and due <= now and now - self._check_asked > _ORPHAN_CHECK_SECONDS:
            self._check_asked = now
            self._check_ends = dict(await self._inputs.end_offsets(self.state.rollouts))
        if self._check_ends and all(part.position >= self._check_ends[tp] for tp, part in self.state.rollouts.items()):
            self._check_ends = {}
            self._caught_up = self._check_asked
            self._changed.set()

    def _report(self) -> None:
        """One line of what happened since the last one."""
        new = self.state.counts - self._reported
        self._reported = Counter(self.state.counts)
        if new:
            said = ", ".join(f"{name} {count}" for name, count in sorted(new.items()))
            logger.info("%s; %d open, %d pending", said, len(self.state.open), self.state.pending)

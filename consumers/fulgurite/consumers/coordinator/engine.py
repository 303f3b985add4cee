"""Commands: from a request (or the clock) to events in the log, and back to an answer.

    request ──1 decide──► 2 publish, acks=all ──► log ──► 3 read back, fold ──► 4 answer from the state
                                                   ▲
                          other producers ─────────┘

The log is the only judge. A command changes nothing itself: its events count when they are read back from the log, in
the order in which the log has them, by the same fold that a replay uses.

1. Decide. The command waits until no other command of this process is busy with the rollout, then looks at the state
   and makes its events. A crash here leaves nothing.
2. Publish the events, same key, in order, idempotent producer, acks=all. A crash in the middle leaves a beginning
   (`attempt_finished` alone, `cancelled` alone): whoever reads the log next finds it in `state.owed` and completes it.
3. The tail of the log brings them back and folds them in. A crash before that loses an answer, never an event: the
   client asks again and gets the same answer (ending and creating are idempotent); an attempt whose start was never
   answered is found by its lease.
4. Answer. What was written is now what is read. An `attempt_started` that turned out void (another coordinator, a
   cancel that came first) is not handed out: so no rollout is ever handed out twice, fenced or not.

Why not transactions: one takes 45 ms or more here, two of them on the path of every rollout; an acknowledged record is
read back in a few milliseconds. Fencing (term.py) only has to be quick then, not exact: the log stays right meanwhile.
Why not apply at the acknowledgement: a foreign `cancelled` may lie before our record without having been read, and the
state would depend on who read what when; a replay would find another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fulgurite.consumers.coordinator import commands
from fulgurite.consumers.coordinator.end_waits import EndWaits
from fulgurite.consumers.coordinator.refused import Refused
from fulgurite.consumers.coordinator.state import FINAL, AttemptRecord, Outcome, RolloutRecord, State
from fulgurite.producers.publisher import Publisher
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.coordinator import EnqueueRollout
from fulgurite.schemas.errors import BufferFull, RecordTooLarge, Undelivered
from fulgurite.schemas.ids import MAX_ID_CHARS
from fulgurite.schemas.rollouts import AttemptEnd, RolloutEvent, RolloutQueued
from fulgurite.schemas.topics import ROLLOUTS

logger = logging.getLogger(__name__)

T = TypeVar("T")

COMMAND_SECONDS = 8.0
"""Longest that a client waits for the log; then 503, before its own patience (10 s) ends.

The command itself goes on: its outcome is in the log."""
MAX_COMMANDS = 10_000
"""Commands under way at once, and workers waiting at once; more are refused with 503."""

Granted = tuple[RolloutRecord, AttemptRecord]


class Waiter:
    """A worker that asked for work and waits."""

    def __init__(self, worker_id: str, limit: int) -> None:
        self.worker_id = worker_id
        self.limit = limit
        self.granted: asyncio.Future[list[Granted]] = asyncio.get_running_loop().create_future()
        self.gone = False
        """Nobody listens any more."""


class Engine:
    """`fold` is fed by the tail of the log; everything else is called by routes and by the clock."""

    def __init__(self, state: State, publisher: Publisher, max_queued: int, max_record_bytes: int) -> None:
        self.state = state
        self._publisher = publisher
        self._max_queued = max_queued
        self._max_event_bytes = max_record_bytes - MAX_ID_CHARS
        self._busy: dict[str, asyncio.Future[None]] = {}
        self._readback: dict[str, asyncio.Future[Outcome]] = {}
        self._idle_workers: deque[Waiter] = deque()
        self._end_waits = EndWaits()
        self._tasks: set[asyncio.Task[Any]] = set()

    # 3. The log comes back.

    def fold(self, event: RolloutEvent) -> Outcome:
        outcome = self.state.apply(event)
        if (waiting := self._readback.pop(event.event_id, None)) is not None and not waiting.done():
            waiting.set_result(outcome)
        if event.event == "finished":
            self._end_waits.ended(event.rollout_id)
        return outcome

    def react(self) -> None:
        """What follows from new records: complete what is half done, hand out what is queued."""
        for rollout_id in [each for each in self.state.owed if each not in self._busy]:
            if len(self._tasks) >= MAX_COMMANDS:
                break
            self._spawn(self._complete(rollout_id), f"completing {rollout_id}")
        self._dispatch()

    # Commands. Each raises Refused with the HTTP status that says what is wrong.

    async def enqueue(self, requests: Sequence[EnqueueRollout]) -> list[RolloutRecord]:
        """The rollouts, in the order of the request; those that existed as they stand."""
        if len(self.state.queue) + len(requests) > self._max_queued:
            raise Refused(429, f"{len(self.state.queue)} rollouts are queued; the bound is {self._max_queued}")
        events = commands.queue(requests)
        wanted = [event.rollout_id for event in events]
        await self._answer(self._create({event.rollout_id: event for event in reversed(events)}))
        return [self._rollout(rollout_id) for rollout_id in wanted]

    async def start(self, request: EnqueueRollout, worker_id: str) -> Granted:
        """Creates a rollout and its first attempt, past the queue."""
        [event] = commands.queue([request])
        return await self._answer(self._start(event, worker_id))

    async def dequeue(self, limit: int, worker_id: str, wait_seconds: float) -> list[Granted]:
        """Up to `limit` rollouts with a new attempt each; waits for the first. Cancel it when the client hung up."""
        if len(self._idle_workers) >= MAX_COMMANDS:
            raise Refused(503, f"{MAX_COMMANDS} workers are waiting already")
        waiter = Waiter(worker_id, limit)
        self._idle_workers.append(waiter)
        self._dispatch()
        try:
            await asyncio.wait({waiter.granted}, timeout=wait_seconds)
            if waiter not in self._idle_workers:  # its rollouts are being started
                await asyncio.wait({waiter.granted}, timeout=COMMAND_SECONDS)
                if not waiter.granted.done():
                    raise Refused(503, "the log did not confirm in time: ask again")
                return waiter.granted.result()
            return []
        except BaseException:
            waiter.gone = True
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._hand_back(waiter.granted.result())
            raise
        finally:
            if waiter in self._idle_workers:
                self._idle_workers.remove(waiter)

    async def end_attempt(
        self, rollout_id: str, attempt_id: str, status: AttemptEnd, error: str, metadata: dict[str, str] | None = None
    ) -> None:
        await self._answer(self._end_attempt(rollout_id, attempt_id, status, error, metadata))

    async def cancel(self, rollout_id: str, reason: str) -> None:
        await self._answer(self._cancel(rollout_id, reason))

    async def wait_for_end(self, rollout_ids: Iterable[str], timeout_seconds: float) -> None:
        """Returns when all of them have ended, or time is up. Ids nobody queued yet are waited for."""
        await self._end_waits.wait({each for each in rollout_ids if not self._has_ended(each)}, timeout_seconds)

    def expire(self, rollout_id: str, attempt_id: str, status: AttemptEnd, error: str) -> None:
        """The clock's command: ends the attempt unless something else is happening to it."""
        if rollout_id not in self._busy and len(self._tasks) < MAX_COMMANDS:
            self._spawn(self._end_attempt(rollout_id, attempt_id, status, error), f"ending {attempt_id}")

    def let_go(self) -> None:
        """Everybody who waits gets what there is, at once."""
        while self._idle_workers:
            self._idle_workers.popleft().granted.set_result([])
        self._end_waits.let_go()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    # The commands' own course, steps 1 to 3.

    async def _create(self, events: dict[str, RolloutQueued]) -> None:
        async with self._hold(*events):
            new = [event for rollout_id, event in events.items() if rollout_id not in self.state.rollouts]
            await self._write(sorted(new, key=lambda event: event.time_ns))

    async def _start(self, event: RolloutQueued, worker_id: str) -> Granted:
        async with self._hold(event.rollout_id):
            record = self.state.rollouts.get(event.rollout_id)
            if record is None:
                await self._write([event, commands.start_attempt(event, worker_id)])
            elif record.is_queued:
                await self._write([commands.start_attempt(record, worker_id)])
        record = self._rollout(event.rollout_id)
        if record.latest is None:
            raise Refused(409, f"rollout {record.rollout_id} is {record.status} and has no attempt")
        return record, record.latest

    async def _end_attempt(
        self, rollout_id: str, attempt_id: str, status: AttemptEnd, error: str, metadata: dict[str, str] | None = None
    ) -> None:
        async with self._hold(rollout_id):
            record = self._rollout(rollout_id)
            attempt = self._attempt(record, attempt_id)
            if attempt.end is None:
                await self._write(commands.end_attempt(record, status, error, metadata))
        if attempt.end != status:  # whichever end the log has first is the end
            raise Refused(409, f"attempt {attempt_id} of rollout {rollout_id} has ended already: {attempt.end}")

    async def _cancel(self, rollout_id: str, reason: str) -> None:
        async with self._hold(rollout_id):
            record = self._rollout(rollout_id)
            if record.status not in FINAL:
                await self._write(commands.cancel(record, reason))
        if record.status != "cancelled":
            raise Refused(409, f"rollout {rollout_id} has ended already: {record.status}")

    async def _complete(self, rollout_id: str) -> None:
        async with self._hold(rollout_id):
            record = self.state.rollouts.get(rollout_id)
            if record is not None and record.owes_successor:
                await self._write(commands.complete(record))

    async def _grant(self, waiter: Waiter, records: list[RolloutRecord]) -> None:
        """Starts an attempt of each (they are busy by now) and gives the waiter those that the log let through."""
        try:
            starts = [commands.start_attempt(record, waiter.worker_id) for record in records]
            outcomes = await self._write(starts)
            granted: list[Granted] = []
            for record, outcome in zip(records, outcomes, strict=True):
                if outcome == "applied" and (attempt := record.latest) is not None:
                    granted.append((record, attempt))
        except (Undelivered, BufferFull) as error:
            if not waiter.granted.done():
                waiter.granted.set_exception(Refused(503, f"cannot write to the log: {error}"))
                waiter.granted.exception()  # seen, also where the waiter is gone
            return
        finally:
            for record in records:
                self.state.queue.put_back(record.rollout_id)
                self._release(record.rollout_id)
        if waiter.gone:
            self._hand_back(granted)
        else:
            waiter.granted.set_result(granted)

    def _dispatch(self) -> None:
        """Gives queued rollouts to waiting workers, first come, first served."""
        while self._idle_workers and len(self.state.queue):
            taken = self.state.queue.take(self._idle_workers[0].limit, self._busy.__contains__)
            if not taken:
                return
            waiter = self._idle_workers.popleft()
            for rollout_id in taken:
                self._busy[rollout_id] = asyncio.get_running_loop().create_future()
            records = [self.state.rollouts[rollout_id] for rollout_id in taken]
            self._spawn(self._grant(waiter, records), "starting attempts")

    def _hand_back(self, granted: list[Granted]) -> None:
        """The worker hung up before it got them: ends them now instead of when their leases do."""
        for record, attempt in granted:
            self.expire(record.rollout_id, attempt.attempt_id, "unresponsive", "the worker hung up before it started")

    async def _write(self, events: Sequence[RolloutEvent]) -> list[Outcome]:
        """Steps 2 and 3: returns what became of each event. RecordTooLarge comes before anything is published."""
        values = [encode(event, self._max_event_bytes) for event in events]
        loop = asyncio.get_running_loop()
        waits = [self._readback.setdefault(event.event_id, loop.create_future()) for event in events]
        try:
            acks = [
                await self._publisher.publish_bytes(ROLLOUTS, encode_key(event.rollout_id), value)
                for event, value in zip(events, values, strict=True)
            ]
            for ack in acks:
                await ack
            return [await each for each in waits]
        finally:
            for event in events:
                self._readback.pop(event.event_id, None)

    @asynccontextmanager
    async def _hold(self, *rollout_ids: str) -> AsyncGenerator[None]:
        """One command at a time for each of them, so that commands of one process do not void each other."""
        while busy := next((self._busy[each] for each in rollout_ids if each in self._busy), None):
            await asyncio.wait({busy})
        for rollout_id in rollout_ids:
            self._busy[rollout_id] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            for rollout_id in rollout_ids:
                self._release(rollout_id)
            self._dispatch()

    def _release(self, rollout_id: str) -> None:
        self._busy.pop(rollout_id).set_result(None)

    async def _answer(self, command: Coroutine[Any, Any, T]) -> T:
        """Step 4. The command goes on when its client does not wait for it."""
        if len(self._tasks) >= MAX_COMMANDS:
            command.close()
            raise Refused(503, f"{MAX_COMMANDS} commands are under way already")
        task = asyncio.get_running_loop().create_task(command)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task}, timeout=COMMAND_SECONDS)
        if not task.done():
            raise Refused(503, "the log did not confirm in time: ask again")
        try:
            return task.result()
        except RecordTooLarge as error:
            raise Refused(413, str(error)) from error
        except (Undelivered, BufferFull) as error:
            raise Refused(503, f"cannot write to the log: {error}") from error

    def _spawn(self, command: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.get_running_loop().create_task(command, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        task.add_done_callback(_report)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its client may be gone

    def _rollout(self, rollout_id: str) -> RolloutRecord:
        record = self.state.rollouts.get(rollout_id)
        if record is None:
            raise Refused(404, f"there is no rollout {rollout_id}")
        return record

    def _attempt(self, record: RolloutRecord, attempt_id: str) -> AttemptRecord:
        attempt = record.attempt(attempt_id)
        if attempt is None:
            raise Refused(404, f"rollout {record.rollout_id} has no attempt {attempt_id}")
        return attempt

    def _has_ended(self, rollout_id: str) -> bool:
        record = self.state.rollouts.get(rollout_id)
        return record is not None and record.status in FINAL


def _report(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, Refused):  # somebody ended it first: what the clock wanted is moot
        logger.debug("%s: %s", task.get_name(), error)
    else:  # the clock tries again at its next tick
        logger.warning("%s: %r", task.get_name(), error)

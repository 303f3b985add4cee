"""The coordinator as a service: reads the log, keeps time, serves HTTP. What a command promises: engine.py.

    topic rollouts ──► tail ──► fold ──► state ◄── HTTP /v1/agl (runners, trainers, people)
          ▲              │                 │
          │              └─ invalid ──► term (1/s): dead letters + offsets, one transaction; proves nobody took over
          └───── publisher ◄── commands ◄──┴── clock (4/s): attempts that timed out or fell silent, half-done ends

| part  | consumes            | produces                  | waits for            | unblocked by                     |
|-------|---------------------|---------------------------|----------------------|----------------------------------|
| tail  | rollouts            | state, dead letters       | records              | the broker; room for dead letters|
| term  | dead letters        | dead_letters, offsets     | its second           | commit; ends us when fenced      |
| clock | state, leases       | ends of attempts          | its tick             | –                                |
| HTTP  | requests            | commands                  | the log              | read-back, 8 s                   |

Start, in this order, because each step must not happen before the one above it:
1. bind the port: who cannot serve must not depose who can
2. replay the log to its end, without acting: the predecessor goes on working meanwhile
3. claim the term: fences the predecessor
4. replay to the end again: everything the predecessor had acknowledged is in the state
5. grant every open attempt one lease, complete what is half done, answer requests
A crash in 1 to 4 changes nothing; after 3 the supervisor's next start takes over the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from fulgurite.consumers.coordinator.api import Api
from fulgurite.consumers.coordinator.engine import Engine
from fulgurite.consumers.coordinator.leases import Leases, Workers
from fulgurite.consumers.coordinator.log import Batch, Entry, Offsets, RolloutLog
from fulgurite.consumers.coordinator.state import State
from fulgurite.consumers.coordinator.term import TERM_SECONDS, Term
from fulgurite.producers.connections import server_of
from fulgurite.producers.publisher import Publisher
from fulgurite.producers.service import bind
from fulgurite.schemas.codec import encode_key
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import RecordTooLarge, Undelivered
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import ROLLOUTS

logger = logging.getLogger(__name__)

MAX_DEAD_LETTERS = 1_000
"""Collected between two commits of the term; the tail waits when there are more."""
STALL_SECONDS = 2.0
"""A clock that late means that the process stood still and heard nobody: leases are made longer by as much."""
_CLOSE_SECONDS = 3.0


class Coordinator:
    def __init__(self, settings: Settings) -> None:
        own = settings.coordinator
        self._tick_seconds = own.tick_seconds
        self.state = State(own.max_rollouts_in_memory)
        self._log = RolloutLog(settings.kafka)
        self._term = Term(settings.kafka)
        # At the end nothing needs long: what was not acknowledged was not answered either.
        producer = settings.producer.model_copy(update={"delivery_seconds": _CLOSE_SECONDS})
        self._publisher = Publisher(settings.kafka, producer)
        max_record_bytes = settings.kafka.max_record_bytes
        self._engine = Engine(self.state, self._publisher, own.max_rollouts_in_memory, max_record_bytes)
        self._leases = Leases()
        self._workers = Workers()
        api = Api(self._engine, self._leases, self._workers, self._publisher, self.not_ready, max_record_bytes)
        self.app = api.app()
        self._phase: str | None = "starting: the broker has not answered yet"
        self._letters: list[DeadLetter] = []
        self._letters_taken = asyncio.Event()
        self._already_handled: Offsets = {}
        self._handled: Offsets = {}

    def not_ready(self) -> str | None:
        """Why requests cannot be served; None when they can."""
        if self._phase is None and not self._term.is_confirmed:
            return "the broker does not answer"
        return self._phase

    def let_go(self) -> None:
        """Stops serving: new requests are refused, long polls answered."""
        self._phase = "stopping"
        self._engine.let_go()

    async def run(self) -> None:
        """Until cancelled. Raises Fenced when another coordinator takes over."""
        try:
            await self._publisher.start()
            await self._log.open()
            await self._replay()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow())
                tasks.create_task(self._keep_time())
                tasks.create_task(self._keep_term())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._phase = "stopping"
            await self._close()

    async def _close(self) -> None:
        await self._engine.close()
        await self._log.close()
        await self._term.close()
        try:
            await self._publisher.close()
        except Undelivered as error:
            logger.warning("not delivered, and so never answered: %s", error)

    # Start, steps 2 to 5.

    async def _replay(self) -> None:
        started = time.monotonic()
        self._phase = "replaying the log"
        self._already_handled = await self._term.handled(range(self._log.partitions))
        ends = await self._log.end_offsets()
        while not await self._log.reached(ends) and len(self._letters) < MAX_DEAD_LETTERS:  # 2
            await self._take(await self._log.read())
        await self._term.claim()  # 3
        self._already_handled = await self._term.handled(range(self._log.partitions))
        self._letters = [letter for letter in self._letters if not self._is_handled(letter.partition, letter.offset)]
        self._handled = await self._log.next_offsets()
        ends = await self._log.end_offsets()
        while not await self._log.reached(ends):  # 4
            await self._take(await self._log.read())
            if len(self._letters) >= MAX_DEAD_LETTERS:
                await self._renew()
        await self._renew()
        now = asyncio.get_running_loop().time()
        for attempt_id in self.state.open_attempts:  # 5
            self._leases.grant(attempt_id, now)
        self._phase = None
        self._engine.react()
        logger.info(
            "ready: %d rollouts, %d queued, %d attempts open, replayed in %.1f s",
            len(self.state.rollouts),
            len(self.state.queue),
            len(self.state.open_attempts),
            time.monotonic() - started,
        )

    # The tail.

    async def _follow(self) -> None:
        while True:
            batch = await self._log.read()
            if batch.entries or batch.invalid:
                await self._take(batch)
                self._engine.react()
            else:
                self._handled = batch.next_offsets
            while len(self._letters) >= MAX_DEAD_LETTERS:
                self._letters_taken.clear()
                await self._letters_taken.wait()

    async def _take(self, batch: Batch) -> None:
        letters = list(batch.invalid)
        now = asyncio.get_running_loop().time()
        for entry in batch.entries:
            if entry.misrouted:
                letters += await self._forward(entry)
            elif self._engine.fold(entry.event) == "unknown":
                message = f"{entry.event.event} of rollout {entry.event.rollout_id}, which nobody queued"
                letters.append(entry.dead_letter(self._log.topic, "unknown_rollout", message))
            else:
                self._leases.follow(entry.event, self.state, now)
        # Together, without a pause: a commit in between would leave letters to be written again after a crash.
        self._letters += [letter for letter in letters if not self._is_handled(letter.partition, letter.offset)]
        self._handled = batch.next_offsets

    async def _forward(self, entry: Entry) -> list[DeadLetter]:
        """Its own bytes, to the partition where the rollout's other events are; only there does it count. Gives a dead
        letter when it does not fit through."""
        if not self._is_handled(entry.partition, entry.offset):
            key = encode_key(entry.event.rollout_id)
            try:
                await (await self._publisher.publish_bytes(ROLLOUTS, key, entry.value))
            except RecordTooLarge as error:
                return [entry.dead_letter(self._log.topic, error.reason, f"in the wrong partition, and {error}")]
        return []

    def _is_handled(self, partition: int, offset: int) -> bool:
        return offset < self._already_handled.get(partition, 0)

    # The term.

    async def _keep_term(self) -> None:
        while True:
            await asyncio.sleep(TERM_SECONDS)
            await self._renew()

    async def _renew(self) -> None:
        letters, self._letters = self._letters, []
        if letters:
            first = letters[0]
            where = f"{first.topic}/{first.partition}/{first.offset}"
            logger.warning("%d unusable records become dead letters; %s: %s", len(letters), where, first.message)
        self._letters_taken.set()
        await self._term.renew(letters, self._handled)

    # The clock.

    async def _keep_time(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(self._tick_seconds)
            now = loop.time()
            late = now - last - self._tick_seconds
            last = now
            if late > STALL_SECONDS:
                logger.warning("stood still for %.1f s: every lease is made longer by as much", late)
                self._leases.forgive(late)
            if not self._term.is_confirmed:
                continue  # perhaps somebody else keeps the time by now
            for rollout_id, attempt_id, end in list(self._leases.expired(self.state, now, now_ns())):
                config = self.state.rollouts[rollout_id].config
                bound = config.timeout_seconds if end == "timeout" else config.unresponsive_seconds
                self._engine.expire(rollout_id, attempt_id, end, f"{end} after {bound:g} s")
            self._engine.react()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Runs the coordinator until `stop`. Raises StartError for a taken port, Fenced when another one takes over."""
    with bind("coordinator", settings.coordinator.host, settings.coordinator.port) as listener:  # 1
        coordinator = Coordinator(settings)
        server = server_of(coordinator.app, name="coordinator", lifespan="off", grace_seconds=2)
        running = asyncio.create_task(coordinator.run())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({running, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            coordinator.let_go()
            server.should_exit = True
            stopping.cancel()
            await serving
            await _end(running)


async def _end(running: asyncio.Task[None]) -> None:
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running

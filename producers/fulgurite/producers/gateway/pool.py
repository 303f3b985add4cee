"""The pool of backends: an Ask goes in, the answer of whichever backend could give one comes out (see exchange.py).

    Ask ─► route allowed? ─► who serves the model? ─► room, or a place in line ─► one backend ─► status known: Exchange
               │ 404             │ 404                  │ 429, 503          ▲        │ away: another one, or a pause
                                                                            └────────┘        503, 504 at the deadline

The parts: members.py and routing.py (who serves a model), places.py (who takes a request now, who waits), breaker.py
(who is left alone), replica.py (HTTP), labels.py (versions).

Asked again, on another backend first, or after a pause: refused and broken connections, 502, 503, 504 (a swap, a
restart, a full queue), and a 500 of a vLLM: its engine may have died. So are whole answers that break off, and streams
that do, or report an error, before the first event has passed on (`Answers.again`): a vLLM sends their head before it
has looked at the request.
That is safe: no byte of an answer has reached the agent, so what a dying server sampled is seen by nobody and recorded
nowhere.
Everything else is the model's answer to this request. A request that a backend had when it broke may be what killed it:
after MAX_BROKEN_TRIES of those it is given up, before it kills the rest, and as soon as every replica said 500, or that
it failed. An external provider is paid for what it worked on: after its 502 or 504, or what broke, it is asked once
more. Whoever is given up on so has the last word: its error is the agent's.

A vLLM also says 500, or reports it within a stream, of a single request that it cannot serve (a grammar that refused a
token) while it serves all others, and one agent's bad request must not shut out everybody. So after that it is asked
whether it is well. If not, it has failed. If it is, the failure is the backend's where another one then answers the
same request; else it is the request's, and the breaker hears nothing of it.

Only the routes in ROUTES can be asked: what changes weights or shows a server's inside is out of reach, whatever an
agent writes into a path.
"""

from __future__ import annotations

import asyncio
import logging
import random
from types import TracebackType
from typing import Any, Final

from fulgurite.producers.gateway.away import Away, most_tries
from fulgurite.producers.gateway.errors import BROKEN, ApiError
from fulgurite.producers.gateway.exchange import Ask
from fulgurite.producers.gateway.http_exchange import HttpExchange
from fulgurite.producers.gateway.members import Member, Members
from fulgurite.producers.gateway.metrics import Metrics
from fulgurite.producers.gateway.patience import Patience
from fulgurite.producers.gateway.places import Capacity, Places, QueueTimeout, Seat
from fulgurite.producers.gateway.routing import ROUTES
from fulgurite.schemas.settings import GatewaySettings

logger = logging.getLogger(__name__)

BACKOFF_SECONDS: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
"""After every backend was tried: a swap takes tens of milliseconds, a restart seconds."""
LOG_EVERY_SECONDS: Final = 5.0
OK: Final = 200


class Pool:
    """Use as an async context manager. Implements `Backends`."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self.metrics = metrics or Metrics()
        self._tasks = asyncio.TaskGroup()
        self._logged_at: dict[str, float] = {}

    async def __aenter__(self) -> Pool:
        self._loop = asyncio.get_running_loop()
        self._places = Places(self._settings.max_concurrent_requests, self._settings.max_queued_requests)
        self.metrics.waiting.set_function(lambda: self._places.waiting)
        await self._tasks.__aenter__()
        self._members = Members(self._settings, self.metrics, self._tasks, self._places.changed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An unexpected error of a task of ours has cancelled the block, and comes out here."""
        self._members.close()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        finally:
            self._places.close()

    def open(self, ask: Ask) -> Opened:
        """The answer of whichever backend could give one. Raises ApiError, see `Backends`.

        However the block is left, also by cancellation, the backend's connection and the seat are free after it.
        """
        return Opened(self, ask)

    async def begin(self, tries: Opened) -> HttpExchange:
        """What `open` does at the beginning of its block."""
        ask = tries.ask
        if ask.route.partition("?")[0] not in ROUTES:
            raise ApiError(404, "not_found", f"no backend is asked for {ask.route[:200]}")
        tries.ask, serving = await self._members.serving(ask)
        able = [member for member in serving if member.url not in ask.without] if ask.without else serving
        tries.candidates = tuple(member.capacity for member in able or serving)
        self._places.admit(tries.candidates, past_bounds=tries.ask.past_bounds)
        tries.began = self._loop.time()
        try:
            return await self.answered(tries)
        except BaseException:
            self._places.dismiss()
            raise

    def end(self, tries: Opened, exchange: HttpExchange) -> None:
        """And at the end."""
        exchange.close()
        if tries.excused and exchange.status == OK and exchange.seat.answered:
            for seat in tries.excused:
                if seat.capacity is not exchange.capacity:
                    self._places.failed(seat.capacity, seat.era)
        self._places.dismiss()

    async def blame(self, tries: Opened, seat: Seat) -> None:
        """Finds out who is at fault for a failure that a backend reported."""
        if await self._members[seat.capacity].says_well():
            seat.excused()
            tries.excused.append(seat)
        else:
            seat.failed(self._loop.time())

    async def follows_policy(self, model: str, deadline: float, authorization: str) -> bool:
        """See `Backends`."""
        return await self._members.follows_policy(model, deadline, authorization)

    def endpoints(self, model: str) -> frozenset[str]:
        """See `Backends`."""
        return self._members.endpoints(model)

    def preferred(self, model: str, pin: str) -> str:
        """See `Backends`."""
        return self._members.preferred(model, pin)

    async def models(self, authorization: str = "") -> list[dict[str, Any]]:
        """What all backends serve, as /v1/models describes it. Raises ApiError(503) when none of them could say."""
        return await self._members.models(authorization)

    async def health(self, timeout_seconds: float) -> str:
        """Empty when at least one backend is well, else what is wrong."""
        return await self._members.health(timeout_seconds)

    def state(self) -> list[dict[str, Any]]:
        """Of each backend, for a report to whoever runs the gateway; agents should not see it."""
        return self._members.state()

    def is_away(self, tries: Opened, capacity: Capacity, error: Away, *, dead: bool) -> bool:
        """Notes a try that gave nothing. Whether the request is given up."""
        tries.away = str(error)
        tries.tried.add(capacity)
        tries.broken += error.most_tries > 0
        if dead:
            tries.dead.add(capacity)
        member = self._members[capacity]
        member.metrics.failures.inc()
        self._log_away(member, tries.away)
        return 0 < error.most_tries <= tries.broken or len(tries.dead) == len(tries.candidates)

    def is_late(self, tries: Opened) -> bool:
        """Whether nothing is asked any more. For an answer that comes whole the others are, while it may be waited for:
        it may well have broken off when the time for a first byte was over."""
        now, ask = self._loop.time(), tries.ask
        return now >= ask.deadline and (now >= ask.whole_deadline or tries.tried.issuperset(tries.candidates))

    async def answered(self, tries: Opened) -> HttpExchange:
        """Tries until somebody answers. The seat is the exchange's; on an error it has been left."""
        ask, candidates = tries.ask, tries.candidates
        while True:
            untried = [capacity for capacity in candidates if capacity not in tries.tried]
            may_pass = tries.count > 0 or ask.past_bounds
            seat = self._places.take_now(untried, ask.pin, past_bounds=ask.past_bounds) if may_pass else None
            if seat is None:
                away = f"{tries.away}; {tries.count} tries" if tries.count else ""
                if tries.count or ask.past_bounds:
                    await self._pause(ask, tries.rounds, away or _why_away(candidates), tries.began)
                    tries.rounds += 1
                    tries.tried.clear()
                if ask.past_bounds:
                    continue  # it waits in no line, also where its backend was away for a moment
                seat = await self._seat(ask, candidates, away)
            tries.count += 1
            member = self._members[seat.capacity]
            if tries.count == 1:
                self.metrics.queue_seconds.observe(self._loop.time() - tries.began)
            try:
                return await self._try(member, ask, seat, tries.count, tries.away)
            except Away as error:
                said = error.said
                if said and error.reported:
                    try:
                        await self.blame(tries, seat)
                    except BaseException:
                        said.close()  # leaves the seat, too
                        raise
                given_up = self.is_away(tries, seat.capacity, error, dead=error.reported)
                if given_up and said:
                    return said
                if said:
                    said.close()
                seat.leave()
                if given_up:
                    message = f"{tries.broken} tries of this request broke their backend ({tries.away}); it is given up"
                    raise ApiError(502, BROKEN, message) from None
            except BaseException:
                seat.leave()
                raise

    async def _try(self, member: Member, ask: Ask, seat: Seat, tries: int, away: str) -> HttpExchange:
        """One try, after others that ended with `away`. Raises Away, and ApiError(504) at the deadline."""
        began = self._loop.time()
        try:
            async with Patience(member, ask, self._loop):
                exchange = await member.ask(ask, seat, tries, self._settings.silence_seconds)
        except TimeoutError:
            member.metrics.failures.inc()
            took = self._loop.time() - began
            # An agent that waits for less than the gateway would proves nothing, and what is well may take long.
            if took >= self._settings.backend_seconds / 2 and not member.looks_well:
                seat.failed(self._loop.time())
            before = f" (try {tries}; the one before: {away})" if away else ""
            raise ApiError(504, "backend_timeout", f"the backend did not answer within {took:.3g} s{before}") from None
        except Away as error:
            if error.said:
                member.metrics.answered(error.said.status, self._loop.time() - began)
            if not error.reported:
                seat.failed(self._loop.time())
            raise
        member.metrics.answered(exchange.status, self._loop.time() - began)
        return exchange

    async def _seat(self, ask: Ask, candidates: tuple[Capacity, ...], away: str) -> Seat:
        now = self._loop.time()
        queue_seconds = self._settings.queue_seconds
        try:
            return await self._places.take(candidates, ask.pin, now + queue_seconds, ask.deadline)
        except QueueTimeout as error:
            waited = self._loop.time() - now
            if error.busy:
                message = f"every backend of this model stayed full for {waited:.3g} s (gateway.queue_seconds)"
                raise ApiError(503, "queue_timeout", message) from None
            raise _unavailable(away or _why_away(candidates), waited) from None

    async def _pause(self, ask: Ask, rounds: int, away: str, began: float) -> None:
        """Before all are tried once more. Raises ApiError(503) when there is no time left for that."""
        # Not all at once: those that failed together would come back together.
        seconds = BACKOFF_SECONDS[min(rounds, len(BACKOFF_SECONDS) - 1)] * random.uniform(0.75, 1.25)
        now = self._loop.time()
        if now + seconds >= ask.deadline:
            raise _unavailable(away, now - began)
        await asyncio.sleep(seconds)

    def _log_away(self, member: Member, away: str) -> None:
        now = self._loop.time()
        if now - self._logged_at.get(member.url, float("-inf")) >= LOG_EVERY_SECONDS:
            self._logged_at[member.url] = now
            logger.warning("backend %s is away (%s); requests go elsewhere or wait and try again", member.url, away)


class Opened:
    """The block of `Pool.open`, and what came of its tries. A class: as a generator it would cost a fifth of what the
    pool does. Implements `Answers`."""

    __slots__ = (
        "_exchange", "_pool", "ask", "away", "began", "broken", "candidates", "count", "dead", "excused", "rounds",
        "tried",
    )  # fmt: skip

    def __init__(self, pool: Pool, ask: Ask) -> None:
        self._pool = pool
        self.ask = ask
        self.candidates: tuple[Capacity, ...] = ()
        self.began = 0.0
        self.tried: set[Capacity] = set()
        """Since the last pause."""
        self.dead: set[Capacity] = set()
        """Who said itself that it failed."""
        self.excused: list[Seat] = []
        """Of those that did, and are well."""
        self.count = self.rounds = self.broken = 0
        self.away = ""
        """How the last try ended."""

    async def __aenter__(self) -> HttpExchange:
        self._exchange = await self._pool.begin(self)
        return self._exchange

    async def __aexit__(self, *_: object) -> None:
        self._pool.end(self, self._exchange)

    async def blame(self, why: str, *, reported: bool) -> None:
        """See `Answers`."""
        exchange = self._exchange
        if reported:
            logger.warning("backend %s reports that it failed within an answer", exchange.endpoint)
            await self._pool.blame(self, exchange.seat)
        else:
            exchange.failed(why)

    def may_ask_again(self, why: str, *, reported: bool) -> bool:
        """See `Answers`."""
        exchange = self._exchange
        error = Away(why, most_tries=most_tries(exchange.kind))
        given_up = self._pool.is_away(self, exchange.capacity, error, dead=reported)
        return not given_up and not self._pool.is_late(self)

    async def again(self) -> HttpExchange:
        """See `Answers`."""
        self._exchange.close()
        self._exchange = await self._pool.answered(self)
        return self._exchange


def _why_away(candidates: tuple[Capacity, ...]) -> str:
    behind = any(capacity.behind for capacity in candidates)
    return "not well, or the weights have no version yet" if behind else "not well"


def _unavailable(away: str, seconds: float) -> ApiError:
    return ApiError(503, "backend_unavailable", f"no backend could answer within {seconds:.3g} s ({away})")

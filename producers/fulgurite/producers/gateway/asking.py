"""From a call to an Ask, and from an Exchange to what is recorded of it. Shared by whole and streamed answers.

Promises of an answer that comes whole: while it breaks off, another replica is asked, as the pool's bounds allow, since
nothing of it has reached the agent; a try that was given up leaves nothing in `Asked`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import BROKEN, ApiError
from fulgurite.producers.gateway.exchange import Answers, Ask, Exchange
from fulgurite.producers.gateway.outcome import Served
from fulgurite.producers.gateway.passing import IDEMPOTENCY_KEY, headers_from

T = TypeVar("T")


@dataclass(slots=True)
class Asked:
    """What came of asking for one call, also where it then failed."""

    served: Served | None = None
    """Who was asked last for an answer."""
    sampled: bytes = b""
    """What was sampled, once all of it is there. It cost what it cost, even if it cannot be put into words."""

    def begin_anew(self) -> None:
        """Forgets a try of which nothing will be recorded."""
        self.served, self.sampled = None, b""


def ask_for(call: Call, deadline: float, whole_deadline: float = 0.0) -> Ask:
    return Ask(
        model=call.model,
        route=call.api.route,
        body_for=call.body_for,
        authorization=call.caller.authorization,
        pin=call.rollout_id,
        deadline=deadline,
        whole_deadline=whole_deadline,
        headers=call.caller.headers,
        query=call.caller.query,
    )


def ask_unchanged(call: Call, deadline: float) -> Ask:
    """For a provider that refused what was added. Another request than the one before: its key is not this one's."""
    ask = ask_for(call, deadline)
    headers = {name: value for name, value in ask.headers.items() if name != IDEMPOTENCY_KEY}
    return replace(ask, body_for=call.unchanged_for, headers=headers)


def served_by(exchange: Exchange) -> Served:
    return Served(
        kind=exchange.kind,
        endpoint=exchange.endpoint,
        resource=exchange.resource,
        tries=exchange.tries,
        status=exchange.status,
        adapter_version=exchange.adapter_version,
        version_before=exchange.version_before,
        headers=headers_from(exchange.kind, exchange.headers),
    )


async def read_all(exchange: Exchange) -> bytes:
    """The whole body. Raises ApiError when it breaks off."""
    parts = [part async for part in exchange.chunks()]
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def until_whole(answers: Answers, take: Callable[[Exchange], Awaitable[T]], asked: Asked | None = None) -> T:
    """What `take` makes of the first answer that comes whole. Raises ApiError, of the last one where none does."""
    async with answers as exchange:
        while True:
            try:
                return await take(exchange)
            except ApiError as error:
                if exchange.status != 200 or error.code != BROKEN:
                    raise
                await answers.blame(error.code, reported=error.reported)
                if not answers.may_ask_again(str(error), reported=False):
                    raise
            if asked:
                asked.begin_anew()
            exchange = await answers.again()

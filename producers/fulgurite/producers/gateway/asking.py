"""From a call to an Ask, and from an Exchange to what is recorded of it. Shared by whole and streamed answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.exchange import Ask, Exchange
from fulgurite.producers.gateway.outcome import Served
from fulgurite.producers.gateway.passing import IDEMPOTENCY_KEY, headers_from


@dataclass(slots=True)
class Asked:
    """What came of asking for one call, also where it then failed."""

    served: Served | None = None
    """Who was asked last for an answer."""
    sampled: bytes = b""
    """What was sampled, once all of it is there. It cost what it cost, even if it cannot be put into words."""


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

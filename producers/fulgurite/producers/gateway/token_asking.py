"""Asking the routes that take and give token ids: an answer in a known shape, or none. See token_flow.py.

Promises: a route that a server does not have is told from one that refuses this request (Unserved, None); what a server
answers in a shape that is not known is an ApiError, never an answer; of rendering, before which nothing was sampled, it
is another version's route, and Unserved. What was sampled is kept in `Asked` before it is looked at: it cost its
tokens, whatever comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from fulgurite.producers.gateway.answers import backend_error, ensure_not_aborted, parse_answer
from fulgurite.producers.gateway.asking import Asked, read_all, served_by, until_whole
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.continuation import Place
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import Ask, Backends, Exchange
from fulgurite.producers.gateway.protocols.base import Json, invalid, to_bytes
from fulgurite.producers.gateway.token_route import DERENDER, DETOKENIZE, GENERATE, RENDER
from fulgurite.producers.gateway.tokens import are_ids

UNSERVED: Final = frozenset({403, 404, 405, 501})
"""vLLM answers 403 where --enable-scale-out is off, 404 where the route is of a later version."""

K = TypeVar("K", bound=Hashable)

UNSERVED_SECONDS: Final = 60.0
"""Who lacks the routes is asked for them again after this: it may have been replaced."""
MAX_LACKING: Final = 1_000
"""So many are remembered; then all are forgotten."""


class Lacking(Generic[K]):
    """Who lacks these routes, as far as was found out: a model, or a kind of call of a server."""

    def __init__(self) -> None:
        self._until: dict[K, float] = {}

    def add(self, key: K) -> None:
        if len(self._until) >= MAX_LACKING:
            self._until.clear()
        self._until[key] = asyncio.get_running_loop().time() + UNSERVED_SECONDS

    def __bool__(self) -> bool:
        """Whether anybody was ever found so."""
        return bool(self._until)

    def __contains__(self, key: K) -> bool:
        return self._until.get(key, 0.0) >= asyncio.get_running_loop().time()


class Unserved(Exception):
    """These routes cannot answer this call; the chat route may."""

    def __init__(self, message: str, endpoint: str) -> None:
        super().__init__(message)
        self.endpoint = endpoint
        """Which replica said so: others may have them."""


@dataclass(slots=True, frozen=True)
class Prepared:
    """A call by its tokens: rendered, and spliced where it goes on."""

    rendered: Json
    prompt: list[int]
    request: Json
    """For GENERATE."""
    answers: tuple[Place, ...] = ()
    """In what was rendered, of which the prompt has the own tokens."""
    turn: str = ""
    """What the prompt does with the turn before, see `Metrics.prompt`."""


class TokenAsker:
    """Asks the backends of a pool."""

    def __init__(self, backends: Backends) -> None:
        self.backends = backends

    async def ask(
        self,
        call: Call,
        route: str,
        body: Mapping[str, Any],
        deadline: float,
        asked: Asked | None = None,
        *,
        whole_deadline: float = 0.0,
        without: frozenset[str] = frozenset(),
    ) -> Json | None:
        """The answer; None for a 400, which the chat route will explain. Raises Unserved, and ApiError for others."""

        async def take(exchange: Exchange) -> tuple[Exchange, bytes]:
            if asked:
                asked.served = served_by(exchange)
            answer = await read_all(exchange)
            if route == GENERATE and exchange.status == 200:
                ensure_not_aborted(call.api, exchange, answer)
            return exchange, answer

        asking = ask_for(call, route, body, deadline, whole_deadline, without)
        exchange, answer = await until_whole(self.backends.open(asking), take, asked)
        if exchange.status in UNSERVED:
            raise unserved(call, exchange, route)
        if exchange.status in (400, 422):
            return None
        if exchange.status != 200:
            raise backend_error(exchange.status, answer)
        if asked and route == GENERATE:
            asked.sampled = answer
        try:
            found = parse_answer(answer)
        except ApiError:
            if route == RENDER:
                raise unserved(call, exchange, route, "in no shape known here") from None
            raise
        is_known = _is_derendered_chunk if route == DERENDER and body.get("stream") else _SHAPES[route]
        if not isinstance(found, dict) or not is_known(found):
            if route == RENDER:
                raise unserved(call, exchange, route, "in no shape known here")
            raise invalid(f"to {route} is in no shape known here")
        return found

    async def ensure_served(self, call: Call, route: str, body: Mapping[str, Any], deadline: float) -> None:
        """Of an answer only the status counts. Raises Unserved."""

        async def take(exchange: Exchange) -> Exchange:
            await read_all(exchange)
            return exchange

        exchange = await until_whole(self.backends.open(ask_for(call, route, body, deadline)), take)
        if exchange.status in UNSERVED:
            raise unserved(call, exchange, route)


def ask_for(
    call: Call,
    route: str,
    body: Mapping[str, Any],
    deadline: float,
    whole_deadline: float = 0.0,
    without: frozenset[str] = frozenset(),
) -> Ask:
    data = to_bytes(body)
    return Ask(
        model=call.model,
        route=route,
        body_for=lambda _: data,
        authorization=call.caller.authorization,
        pin=call.rollout_id,
        deadline=deadline,
        whole_deadline=whole_deadline,
        headers=call.caller.headers if route == GENERATE else {},
        without=without,
        past_bounds=route in (DERENDER, DETOKENIZE),
    )


def unserved(call: Call, exchange: Exchange, route: str, how: str = "") -> Unserved:
    how = how or f"with {exchange.status}"
    message = f"{exchange.endpoint} answers {route} {how}: {call.model} is asked by text there"
    return Unserved(message, exchange.endpoint)


def _is_rendered(answer: Json) -> bool:
    ids = answer.get("token_ids")
    return isinstance(ids, list) and are_ids(ids) and isinstance(answer.get("sampling_params"), dict)


def has_choices(answer: Json) -> bool:
    choices = answer.get("choices")
    return isinstance(choices, list) and all(
        isinstance(choice, dict) and isinstance(choice.get("index"), int) for choice in choices
    )


def _is_generated(answer: Json) -> bool:
    if not has_choices(answer):
        return False
    return all(isinstance(choice.get("token_ids"), list) for choice in answer["choices"])


def _is_derendered(answer: Json) -> bool:
    return has_choices(answer) and all(isinstance(choice.get("message"), dict) for choice in answer["choices"])


def _is_derendered_chunk(answer: Json) -> bool:
    chunk = answer.get("chunk")
    return isinstance(chunk, dict) and has_choices(chunk)


_SHAPES: Final[dict[str, Callable[[Json], bool]]] = {
    RENDER: _is_rendered,
    GENERATE: _is_generated,
    DERENDER: _is_derendered,
    DETOKENIZE: lambda answer: isinstance(answer.get("prompt"), str),
}

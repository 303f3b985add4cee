"""Whether the policy's server holds an answer of its chat route to a grammar, which that route does not say.

A call that a grammar may hold is not to be trained on: its logprobs are not the policy's, or not those of what was
sampled from. What the request asks does not tell (attributes.py): some parsers of vLLM hold every call with tools,
others none. RENDER says what the server makes of the request. It is asked beside the call itself, so that an answer
waits for it only where the answer is there first. Only calls with tools that could be trained on otherwise: without
tools it is the request that asks for a grammar. Where the server does not say, what the request asks counts, and
whether the model's last call that asked for nothing was held. Bounded: models by number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final

from fulgurite.producers.gateway.attributes import OF_TOOLS
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import Backends
from fulgurite.producers.gateway.outcome import Served
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.protocols.base import where
from fulgurite.producers.gateway.token_asking import TokenAsker, Unserved
from fulgurite.producers.gateway.token_route import RENDER, is_held_to_grammar
from fulgurite.schemas.sampling import NEUTRAL_SAMPLING, constraints, is_neutral, may_call_tools

logger = logging.getLogger(__name__)

UNSERVED_SECONDS: Final = 60.0
"""A model whose servers do not have the route is asked for it again after this."""
MAX_MODELS: Final = 1_000
"""Whose state is remembered; then all of it is forgotten."""


class Asking:
    """Of one call, under way beside it."""

    def __init__(self, task: asyncio.Task[bool | None] | None, expected: bool | None) -> None:
        self._task = task
        self._expected = expected

    async def put_into(self, served: Served | None) -> None:
        """What the server says, once it does."""
        if self._task and served:
            served.grammar = self._expected  # in case the agent does not wait for it
            served.grammar = await self._task


class Grammars:
    """One gateway's."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._asker = TokenAsker(backends)
        self._unserved_until: dict[str, float] = {}
        self._holding: set[str] = set()
        """Models of which calls are held that ask for nothing of the kind."""

    @asynccontextmanager
    async def asked(self, call: Call, deadline: float) -> AsyncGenerator[Asking]:
        """Within the block the chat route is asked. What of it is not over at its end is given up."""
        task = asyncio.create_task(self._ask(call, deadline)) if self._matters(call) else None
        try:
            yield Asking(task, self._expected(call))
        finally:
            if task and not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def _expected(self, call: Call) -> bool | None:
        return True if call.model in self._holding else None

    def _matters(self, call: Call) -> bool:
        if call.api is not CHAT or not call.rollout_id or not may_call_tools(call.body):
            return False
        if set(constraints(call.body)) - OF_TOOLS:
            return False
        if not all(is_neutral(name, call.body.get(name)) for name in NEUTRAL_SAMPLING):
            return False
        return self._unserved_until.get(call.model, 0.0) < asyncio.get_running_loop().time()

    async def _ask(self, call: Call, deadline: float) -> bool | None:
        body = {name: value for name, value in call.body.items() if name not in ("stream", "stream_options")}
        try:
            if not await self._backends.follows_policy(call.model, deadline, call.caller.authorization):
                return None
            rendered = await self._asker.ask(call, RENDER, body, deadline)
        except Unserved as error:
            logger.info("%s", error)
            if len(self._unserved_until) >= MAX_MODELS:
                self._unserved_until.clear()
            self._unserved_until[call.model] = asyncio.get_running_loop().time() + UNSERVED_SECONDS
        except ApiError as error:
            logger.info("whether an answer is held to a grammar could not be asked: %s", error.code)
        except Exception as error:
            logger.error("whether an answer is held to a grammar could not be read: %s", where(error))
        else:
            if rendered is not None:
                held = is_held_to_grammar(rendered)
                if not constraints(call.body):
                    self._note(call.model, held)
                return held
        return self._expected(call)

    def _note(self, model: str, held: bool) -> None:
        if not held:
            self._holding.discard(model)
        elif len(self._holding) < MAX_MODELS:
            self._holding.add(model)

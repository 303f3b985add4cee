"""Whether the policy's server holds an answer of its chat route to a grammar, which that route does not say; and with
which sampling parameters of its own it answers.

A call that a grammar may hold is not to be trained on: its logprobs are not the policy's, or not those of what was
sampled from. What the request asks does not tell (attributes.py): some parsers of vLLM hold every call with tools,
others none. RENDER says what the server makes of the request. It makes the same of all that differ only in what is said
(their form), so one of them asks, beside the call itself, and its answer counts for SAID_SECONDS; a call waits for it
only at its own end. Only calls with tools that could be trained on otherwise: without tools it is the request that asks
for a grammar. A replica that cannot say it is passed over for UNSERVED_SECONDS, and another one asked: what one says
counts for all of the model. Where none can say, what the request asks counts, and what was said last of the form, or of
a call of the model that asked for nothing. Where our own bounds, or an agent that hung up, kept the question from the
server, the call counts as held. Bounded: forms and models by number, waits by WAIT_SECONDS.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from fulgurite.producers.gateway.attributes import OF_TOOLS
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import Backends
from fulgurite.producers.gateway.outcome import Served
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.protocols.base import Json, to_bytes, where
from fulgurite.producers.gateway.token_asking import Lacking, TokenAsker, Unserved
from fulgurite.producers.gateway.token_route import RENDER, is_held_to_grammar, shaping, unstreamed
from fulgurite.schemas.sampling import HARMLESS, NEUTRAL_SAMPLING, constraints, is_neutral, may_call_tools

logger = logging.getLogger(__name__)

SAID_SECONDS: Final = 60.0
"""A server is asked again after this: it may have been replaced."""
WAIT_SECONDS: Final = 10.0
"""Longest that the end of an answer waits."""
MAX_FORMS: Final = 1_000
"""And models, whose state is remembered; then all of it is forgotten."""

_OF_ITS_OWN: Final = HARMLESS - {"chat_template", "chat_template_kwargs", "reasoning", "reasoning_effort", "thinking"}
"""Fields that calls of one form may have each for itself."""


@dataclass(slots=True)
class _Form:
    held: bool | None = None
    """As the server said last."""
    sampling: dict[str, float] = field(default_factory=dict[str, float])
    """And what it samples with, by its own defaults, that is not the policy."""
    until: float = 0.0
    """So long that counts."""
    asking: asyncio.Task[None] | None = None
    unasked: bool = False
    """The last question did not reach the server, or its answer nobody: our own bounds, or an agent that hung up."""
    unserved: bool = False
    """Of those who were well none could say it."""


class Asking:
    """Of one call."""

    def __init__(self, grammars: Grammars, call: Call, form: _Form | None, deadline: float) -> None:
        self._grammars = grammars
        self._call = call
        self._form = form
        self._deadline = deadline

    async def put_into(self, served: Served | None) -> None:
        """What the server says, once it does."""
        if not served or not self._form:
            return
        now = asyncio.get_running_loop().time
        self._put_last_word(served, self._form)  # in case the agent does not wait for more
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(self._deadline, now() + WAIT_SECONDS)):
                # Whoever asked may have hung up, or been kept from it, and who answered this call may have been away
                # when it was asked: then this call asks itself, once.
                for own in (False, True):
                    if self._form.until >= now():
                        break
                    if self._form.asking:
                        await asyncio.wait([self._form.asking])
                    elif own and self._grammars.may_say(self._call, self._form, served.endpoint):
                        async with self._grammars.asking(self._call, self._form, self._deadline) as question:
                            await asyncio.wait([question])
        self._put_last_word(served, self._form)

    def _put_last_word(self, served: Served, form: _Form) -> None:
        served.grammar = self._grammars.last_word(self._call, form)
        served.sampling = form.sampling


class Grammars:
    """One gateway's."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._asker = TokenAsker(backends)
        self._lacking: Lacking[tuple[str, str]] = Lacking()
        """Model, and a replica's endpoint."""
        self._forms: dict[bytes, _Form] = {}
        self._holding: set[str] = set()
        """Models of which calls are held that ask for nothing of the kind."""

    @asynccontextmanager
    async def asked(self, call: Call, deadline: float) -> AsyncGenerator[Asking]:
        """Within the block the chat route is asked. What of this call's question is not over at its end is given up."""
        form = self._form(call) if _matters(call) else None
        is_said = form is not None and form.until >= asyncio.get_running_loop().time()
        if form and not form.asking and not is_said:
            form.unserved = self._is_unserved(call.model)
        if form is None or form.asking or is_said or form.unserved:
            yield Asking(self, call, form, deadline)
        else:
            async with self.asking(call, form, deadline):
                yield Asking(self, call, form, deadline)

    @asynccontextmanager
    async def asking(self, call: Call, form: _Form, deadline: float) -> AsyncGenerator[asyncio.Task[None]]:
        """The question is under way, others of the form wait for it. At the end of the block it is given up."""
        form.unasked = True
        task = form.asking = asyncio.create_task(self._ask(call, form, deadline))
        task.add_done_callback(lambda _: setattr(form, "asking", None))
        try:
            yield task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    def last_word(self, call: Call, form: _Form) -> bool | None:
        """None where what the request asks counts."""
        if form.held is not None:
            return form.held
        return True if form.unasked or call.model in self._holding else None

    def may_say(self, call: Call, form: _Form, endpoint: str) -> bool:
        """Whether a question more may be answered, by whom answered this call."""
        return form.unasked or (form.unserved and (call.model, endpoint) not in self._lacking)

    def _without(self, model: str) -> frozenset[str]:
        """Replicas that are not worth a question."""
        if not self._lacking:
            return frozenset()
        return frozenset(each for each in self._backends.endpoints(model) if (model, each) in self._lacking)

    def _is_unserved(self, model: str) -> bool:
        without = self._without(model)
        return bool(without) and without == self._backends.endpoints(model)

    async def _render(self, call: Call, deadline: float) -> Json | None:
        """What the first says that can; None where it refuses this call. Raises Unserved, and ApiError for others."""
        while True:
            without = self._without(call.model)
            try:
                return await self._asker.ask(call, RENDER, unstreamed(call.body), deadline, without=without)
            except Unserved as error:
                logger.info("%s", error)
                key = (call.model, error.endpoint)
                is_known = key in self._lacking
                self._lacking.add(key)
                if is_known or self._is_unserved(call.model):
                    raise

    async def _ask(self, call: Call, form: _Form, deadline: float) -> None:
        """Raises nothing."""
        try:
            follows = await self._backends.follows_policy(call.model, deadline, call.caller.authorization)
            rendered = await self._render(call, deadline) if follows else None
            form.unasked = form.unserved = False
        except Unserved:
            form.unasked, form.unserved = False, True
        except ApiError as error:
            form.unasked = error.code == "too_many_requests" and not error.of_backend
            logger.info("whether an answer is held to a grammar could not be asked: %s", error.code)
        except Exception as error:
            form.unasked = False
            logger.error("whether an answer is held to a grammar could not be read: %s", where(error))
        else:
            if rendered is not None:
                form.held, form.sampling = is_held_to_grammar(rendered), shaping(rendered)
                form.until = asyncio.get_running_loop().time() + SAID_SECONDS
                if not constraints(call.body):
                    self._note(call.model, form.held)

    def _form(self, call: Call) -> _Form:
        wanted = {name: value for name, value in call.body.items() if name not in _OF_ITS_OWN or name == "model"}
        key = blake2b(to_bytes(wanted), digest_size=16).digest()
        if key not in self._forms:
            if len(self._forms) >= MAX_FORMS:
                self._forms.clear()
            self._forms[key] = _Form()
        return self._forms[key]

    def _note(self, model: str, held: bool) -> None:
        if not held:
            self._holding.discard(model)
        elif len(self._holding) < MAX_FORMS:
            self._holding.add(model)


def _matters(call: Call) -> bool:
    """Whether it could be trained on, as far as all but its tools goes."""
    if call.api is not CHAT or not call.rollout_id or not may_call_tools(call.body):
        return False
    if set(constraints(call.body)) - OF_TOOLS:
        return False
    return all(is_neutral(name, call.body.get(name)) for name in NEUTRAL_SAMPLING)

"""The flow of a chat completion by token ids: so that a conversation that goes on does so with exactly its own tokens.

    find the turn it continues ─► render ─► splice ─► generate ─► derender, where a parser has to see it ─► an answer
                                    │ not served, or images                        remember it once the agent has it
                                    └─► None: the chat route answers

What is asked and how answers are put together is in token_route.py, the asking in token_asking.py, streams in
token_stream.py, what continues what in conversations.py, continuation.py and turn_ends.py. Promises: whatever a
backend cannot do this way is asked of its chat route, as if this were not here; so is every call outside a rollout,
which nobody trains on. That they can do it is found out before anything is sampled: once it is, the chat route is not
asked too. Bounded: turns by their tokens, models by number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from fulgurite.producers.gateway.asking import Asked
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.continuation import Closing, Form, NotContinued, Spliced, splice, tokens
from fulgurite.producers.gateway.conversations import Conversations
from fulgurite.producers.gateway.errors import Aborted, ApiError
from fulgurite.producers.gateway.exchange import Backends
from fulgurite.producers.gateway.metrics import Metrics
from fulgurite.producers.gateway.outcome import Outcome, Served
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.protocols.base import Json, invalid, unreadable, where
from fulgurite.producers.gateway.token_asking import Lacking, Prepared, TokenAsker, Unserved
from fulgurite.producers.gateway.token_route import (
    DERENDER,
    DETOKENIZE,
    GENERATE,
    RENDER,
    can_answer,
    can_splice,
    chat_completion,
    derender_request,
    ends_turn,
    generate_request,
    has_texts,
    is_held_to_grammar,
    is_plain,
    shaping,
    shortened,
    spelled_out,
    stops_at_token,
    unstreamed,
    with_request_id,
)
from fulgurite.producers.gateway.token_stream import Translation
from fulgurite.producers.gateway.tool_call_ids import ToolCallIds
from fulgurite.producers.gateway.turn_ends import TEXT, TurnEnds
from fulgurite.producers.gateway.turns import has_answer, has_turn

logger = logging.getLogger(__name__)

AFTERWARDS_SECONDS: Final = 30.0
"""Longest that what an answer needs beside its tokens is waited for, where the time for a first byte is over."""
MAX_MODELS: Final = 1_000
"""On how many servers each counts, whose state is remembered; then all of it is forgotten."""


Kind = tuple[str, str, str]
"""Model, tools (they need a route more, those that must not be called perhaps), and the server's endpoint."""


@dataclass(slots=True)
class Sampled:
    """An answer in the chat route's shape, and what remembering it needs."""

    response: Json
    prepared: Prepared
    generated: list[Json]
    """Choices as GENERATE gave them, those that the agent got whole."""


class TokenRoute:
    """One gateway's. `sample` and `prepare` belong to step 2 of its contract, remembering comes after step 4."""

    def __init__(self, backends: Backends, metrics: Metrics, *, enabled: bool) -> None:
        self._enabled = enabled
        self._backends = backends
        self._metrics = metrics
        self._conversations = Conversations()
        self._lacking: Lacking[Kind] = Lacking()
        self._probed: set[Kind] = set()
        self._asker = TokenAsker(backends)
        self._ends = TurnEnds(self._asker)
        self._call_ids = ToolCallIds(self._asker)

    async def takes(self, call: Call, deadline: float) -> bool:
        """Calls that may be trained on, as far as these routes give all that they ask. Not streams with tools: a parser
        would see all tokens anew with each event."""
        if not self._enabled or call.api is not CHAT or not call.rollout_id:
            return False
        if (call.streamed and call.body.get("tools")) or not can_answer(call.body):
            return False
        if not await self._backends.follows_policy(call.model, deadline, call.caller.authorization):
            return False
        if not self._lacking:
            return True
        return _kind(call, self._backends.preferred(call.model, call.rollout_id)) not in self._lacking

    async def sample(self, call: Call, deadline: float, whole_deadline: float, asked: Asked) -> Sampled | None:
        """The answer; None where the chat route is to be asked. Raises ApiError; who was asked stands in `asked`."""
        try:
            return await self._sample(call, deadline, whole_deadline, asked)
        except Unserved as error:
            self.is_unserved(call, error)
            return None
        except ApiError:
            raise
        except Exception as error:
            raise unreadable(error) from None

    async def prepare(self, call: Call, deadline: float, asked: Asked) -> Prepared | None:
        """What a stream of GENERATE is asked with; None and raises as `sample`."""
        try:
            prepared = await self._prepare(call, deadline, asked)
        except Unserved as error:
            self.is_unserved(call, error)
            return None
        except ApiError:
            raise
        except Exception as error:
            raise unreadable(error) from None
        return prepared if prepared and is_plain(call.body, prepared.rendered) else None

    def is_unserved(self, call: Call, why: Unserved) -> None:
        """For a while such calls are asked of the chat route, where it is that server that would be asked."""
        logger.info("%s", why)
        kind = _kind(call, why.endpoint)
        self._probed.discard(kind)
        self._lacking.add(kind)

    def asked_by_text(self, call: Call, served: Served | None) -> None:
        """What the policy answered to the words of this call is recorded; its tokens are not remembered."""
        if call.rollout_id and served and served.kind == "vllm":
            continued = has_turn(call.api, call.body)
            if continued is not None:
                self._metrics.prompt("by_text" if continued else "begins")

    def remember(self, call: Call, sampled: Sampled) -> None:
        """What the agent got: the next call may continue it. Raises nothing: the call is recorded."""
        self._metrics.prompt(sampled.prepared.turn)
        try:
            messages = {choice["index"]: choice["message"] for choice in sampled.response["choices"]}
            for choice in sampled.generated:
                self._remember(call, sampled.prepared, messages[choice["index"]], choice["token_ids"], choice)
        except Exception as error:
            logger.error("an answer could not be remembered: %s", where(error))

    async def remember_stream(self, call: Call, translation: Translation, outcome: Outcome, deadline: float) -> None:
        """The same of a stream that came to its end. Raises nothing: the agent has its answer."""
        self._metrics.prompt(translation.prepared.turn)
        try:
            answers = {at: end | {"token_ids": outcome.choices[at].token_ids} for at, end in translation.ends.items()}
            await self._ends.learn(call, list(answers.values()), _after(deadline))
            for at, end in answers.items():
                message = outcome.choices[at].output
                self._remember(call, translation.prepared, message, end["token_ids"] or [], end)
        except (ApiError, Unserved) as error:
            logger.info("a conversation will go on with tokens written anew: %s", error)
        except Exception as error:
            logger.error("an answer could not be remembered: %s", where(error))

    def _remember(self, call: Call, prepared: Prepared, message: Json, response: list[int], end: Json) -> None:
        ends = self._ends.known(call.model)
        self._conversations.remember(
            _attempt(call),
            call.body["messages"],
            message,
            rendered=prepared.rendered["token_ids"],
            prompt=prepared.prompt,
            response=response,
            end_text=ends.get(response[-1]) if ends_turn(call.body, end) else None,
            ends=ends,
            answers=prepared.answers,
        )

    async def _prepare(self, call: Call, deadline: float, asked: Asked) -> Prepared | None:
        rendered = await self._asker.ask(call, RENDER, unstreamed(call.body), deadline, asked)
        if rendered is None or not can_splice(rendered):
            return None  # the chat route says what is wrong with it
        await self._closing(call, TEXT, deadline)
        kind = _kind(call, asked.served.endpoint if asked.served else "")
        if kind not in self._probed:
            await self._probe_routes(call, rendered, deadline)
            if len(self._probed) >= MAX_MODELS:
                self._probed.clear()
            self._probed.add(kind)
        spliced, turn = await self._splice(call, rendered["token_ids"], deadline)
        prompt = spliced.prompt.tolist() if spliced else rendered["token_ids"]
        request = generate_request(call.body, rendered, prompt)
        rendered = with_request_id(rendered)
        return Prepared(rendered, prompt, request, spliced.answers if spliced else (), turn)

    async def _sample(self, call: Call, deadline: float, whole_deadline: float, asked: Asked) -> Sampled | None:
        prepared = await self._prepare(call, deadline, asked)
        if prepared is None:
            return None
        try:
            generated = await self._asker.ask(
                call, GENERATE, prepared.request, deadline, asked, whole_deadline=whole_deadline
            )
        except Aborted as error:  # recorded as far as it came
            error.answer = chat_completion(call.body, prepared.rendered, prepared.prompt, error.answer, None, {})
            raise
        if generated is None:
            return None
        if asked.served:
            asked.served.grammar = is_held_to_grammar(prepared.rendered)
            asked.served.sampling = shaping(prepared.rendered)
        derendered = await self._put_into_words(call, prepared, generated, _after(deadline))
        ends = {**self._ends.known(call.model), **await self._stop_texts(call, generated, _after(deadline))}
        response = chat_completion(call.body, prepared.rendered, prepared.prompt, generated, derendered, ends)
        # The next prompt must not hold calls that the agent knows nothing of.
        left_out = shortened(call.body, derendered)
        return Sampled(response, prepared, [each for each in generated["choices"] if each["index"] not in left_out])

    async def _put_into_words(self, call: Call, prepared: Prepared, generated: Json, deadline: float) -> Json | None:
        """None where its text is the answer. Raises ApiError, never Unserved: another route would sample again."""
        wanted: Json | None = None
        try:
            await self._ends.learn(call, generated["choices"], deadline)
        except Unserved as error:
            self.is_unserved(call, error)  # this answer can do without
        except ApiError as error:
            logger.info("how a model's turn ends could not be asked: %s", error)
        plain = is_plain(call.body, prepared.rendered)
        if not plain or not has_texts(generated):
            wanted = derender_request(call.body, generated, prepared.prompt)
        if wanted is None:
            return None
        try:
            derendered = await self._asker.ask(call, DERENDER, wanted, deadline)
        except Unserved as error:
            self.is_unserved(call, error)
            derendered = None
        if derendered is None and plain:  # the route was not looked for: most give the text
            return await self._spell_out(call, wanted["generate_response"]["choices"], deadline)
        if derendered is None:
            raise invalid("could not be put into words by the server that gave it")
        await self._call_ids.put_in(call, wanted, derendered, deadline)
        return derendered

    async def _spell_out(self, call: Call, choices: Sequence[Json], deadline: float) -> Json:
        """Plain answers that nobody puts into words: what their tokens are written as. Raises ApiError."""
        found: list[Json] = []
        for choice in choices:
            body = {"model": call.model, "tokens": choice["token_ids"]}
            answer: Json | None = None
            with suppress(Unserved):
                answer = await self._asker.ask(call, DETOKENIZE, body, deadline)
            if answer is None:
                raise invalid("could not be written as text by the server that gave it")
            found.append(spelled_out(choice, answer["prompt"]))
        return {"choices": found}

    async def _stop_texts(self, call: Call, generated: Json, deadline: float) -> dict[int, str]:
        """How the tokens are written that the agent asked to stop at; nothing where it asks for no logprobs."""
        if not call.body.get("logprobs"):
            return {}
        tokens = {each["token_ids"][-1] for each in generated["choices"] if stops_at_token(call.body, each)}
        found: dict[int, str] = {}
        for token in tokens:
            body = {"model": call.model, "tokens": [token]}
            with suppress(ApiError, Unserved):
                if answer := await self._asker.ask(call, DETOKENIZE, body, deadline):
                    found[token] = answer["prompt"]
        return found

    async def _splice(self, call: Call, rendered: list[int], deadline: float) -> tuple[Spliced | None, str]:
        """(None where the prompt is to be as the template writes it, what that makes of the turn before)."""
        found = self._conversations.find(_attempt(call), call.body["messages"])
        if found is None:
            return None, "unknown_turn" if has_answer(call.body["messages"]) else "begins"
        try:
            closing = await self._closing(call, found.form, deadline, found.follows, found.turn.end)
            spliced = splice(found.turn, tokens(rendered), closing)
        except NotContinued as error:
            return None, error.reason
        return spliced, "continues"

    async def _closing(
        self, call: Call, form: Form, deadline: float, follows: str = "", sampled: int | None = None
    ) -> Closing | None:
        """Raises Unserved only: a call can do without, and the next one asks again."""
        try:
            return await self._ends.closing(call, form, deadline, follows=follows, sampled=sampled)
        except ApiError as error:
            logger.info("how a model's answers are closed could not be asked: %s", error)
            return None

    async def _probe_routes(self, call: Call, rendered: Json, deadline: float) -> None:
        """Whether the routes are there that are asked once an answer is sampled: with the prompt's last token as the
        answer, of which only the status counts. Raises Unserved."""
        ids = rendered["token_ids"][-1:]
        asked: dict[str, Mapping[str, Any]] = {DETOKENIZE: {"model": call.model, "tokens": ids}}
        choice: Json = {"index": 0, "token_ids": ids, "finish_reason": "length", "logprobs": None}
        answer: Json = {"request_id": rendered.get("request_id"), "model": call.model, "choices": [choice]}
        if not is_plain(call.body, rendered) and (wanted := derender_request(call.body, answer, ids)):
            asked[DERENDER] = wanted
        for route, body in asked.items():
            await self._asker.ensure_served(call, route, body, deadline)


def _after(deadline: float) -> float:
    """For what is asked once an answer is there: it may have taken longer than a first byte may."""
    return max(deadline, asyncio.get_running_loop().time() + AFTERWARDS_SECONDS)


def _kind(call: Call, endpoint: str) -> Kind:
    tools = bool(call.body.get("tools"))
    return call.model, ("none" if call.body.get("tool_choice") == "none" else "tools") if tools else "", endpoint


def _attempt(call: Call) -> tuple[str, ...]:
    return call.rollout_id, call.attempt_id, call.agent, call.model

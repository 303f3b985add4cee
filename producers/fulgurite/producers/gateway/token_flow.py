"""The flow of a chat completion by token ids: so that a conversation that goes on does so with exactly its own tokens.

    find the turn it continues ─► render ─► splice ─► generate ─► derender, where a parser has to see it ─► an answer
                                    │ not served, or images                        remember it once the agent has it
                                    └─► None: the chat route answers

What is asked and how answers are put together is in token_route.py, what continues what in conversations.py and
continuation.py. Promises: whatever a backend cannot do this way is asked of its chat route, as if this were not here;
so is every call outside a rollout, which nobody trains on. That they can do it is found out before anything is sampled:
once it is, the chat route is not asked too. Bounded: turns by their tokens, models by number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.answers import backend_error, parse_answer
from fulgurite.producers.gateway.asking import read_all, served_by
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.continuation import NotContinued, splice, tokens
from fulgurite.producers.gateway.conversations import Conversations
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import Ask, Backends, Exchange
from fulgurite.producers.gateway.metrics import Metrics
from fulgurite.producers.gateway.outcome import Outcome, Served
from fulgurite.producers.gateway.protocols import CHAT
from fulgurite.producers.gateway.protocols.base import Json, invalid, parse_data, unreadable, where
from fulgurite.producers.gateway.protocols.choices import DONE
from fulgurite.producers.gateway.token_route import (
    DERENDER,
    DETOKENIZE,
    GENERATE,
    RENDER,
    after_answer,
    can_splice,
    chat_chunk,
    chat_completion,
    derender_request,
    ends_turn,
    generate_request,
    is_plain,
)
from fulgurite.producers.gateway.tokens import are_ids

logger = logging.getLogger(__name__)

UNSERVED: Final = frozenset({403, 404, 405, 501})
"""vLLM answers 403 where --enable-scale-out is off, 404 where the route is of a later version."""
UNSERVED_SECONDS: Final = 60.0
"""A model whose servers do not have the routes is asked again after this: they may have been replaced."""
PROBES: Final = ("a", "b")
"""Answers that differ in their last token, whatever the tokenizer."""
MAX_MODELS: Final = 1_000
"""Whose state is remembered; then all of it is forgotten."""


class Unserved(Exception):
    """These routes cannot answer this call; the chat route may."""


@dataclass(slots=True, frozen=True)
class Prepared:
    """A call by its tokens: rendered, and spliced where it goes on."""

    rendered: Json
    prompt: list[int]
    request: Json
    """For GENERATE."""


@dataclass(slots=True)
class Sampled:
    """An answer in the chat route's shape, and what remembering it needs."""

    served: Served
    response: Json
    prepared: Prepared
    generated: list[Json]
    """Choices as GENERATE gave them."""


class Translation:
    """One stream of GENERATE, event by event in the shape of the chat route's."""

    def __init__(self, call: Call, prepared: Prepared) -> None:
        self.prepared = prepared
        self.ends: dict[int, Json] = {}
        """Of each choice that came to its end: its last event's, for what ended it."""
        self._call = call
        self._begun: set[int] = set()

    def __call__(self, event: sse.Event) -> sse.Event:
        if not event.data or event.data == DONE:
            return event
        given = parse_data(event)
        if given.get("error"):
            return event
        if not _has_choices(given) or not all(isinstance(choice.get("text"), str) for choice in given["choices"]):
            raise invalid("has an event without choices")
        self.ends |= {choice["index"]: choice for choice in given["choices"] if choice.get("finish_reason")}
        created = self._call.start_ns // 10**9
        if not self._begun.issuperset(choice["index"] for choice in given["choices"]):  # each choice begins by itself
            given["prompt_token_ids"] = self.prepared.prompt
        chunk = chat_chunk(self._call.body, self.prepared.rendered, given, self._begun, created)
        data = orjson.dumps(chunk)
        return sse.Event(sse.event(data), data)


class TokenRoute:
    """One gateway's. `sample` and `prepare` belong to step 2 of its contract, remembering comes after step 4."""

    def __init__(self, backends: Backends, metrics: Metrics, *, enabled: bool) -> None:
        self._enabled = enabled
        self._backends = backends
        self._metrics = metrics
        self._conversations = Conversations()
        self._unserved_until: dict[tuple[str, bool], float] = {}
        self._probed: set[tuple[str, bool]] = set()
        self._end_texts: dict[str, dict[int, str]] = {}
        """How each model's end-of-turn tokens are written."""

    def takes(self, call: Call) -> bool:
        """Calls that may be trained on. Not streams with tools: a parser would see all tokens anew with each event."""
        if not self._enabled or call.api is not CHAT or not call.rollout_id:
            return False
        if call.streamed and call.body.get("tools"):
            return False
        until = self._unserved_until.get(_kind(call), 0.0)
        return until < asyncio.get_running_loop().time() and self._backends.follows_policy(call.model)

    async def sample(self, call: Call, deadline: float, asked: list[Served]) -> Sampled | None:
        """The answer; None where the chat route is to be asked. Raises ApiError; who was asked stands in `asked`."""
        try:
            return await self._sample(call, deadline, asked)
        except Unserved as error:
            self.is_unserved(call, str(error))
            return None
        except ApiError:
            raise
        except Exception as error:
            raise unreadable(error) from None

    async def prepare(self, call: Call, deadline: float, asked: list[Served]) -> Prepared | None:
        """What a stream of GENERATE is asked with; None and raises as `sample`."""
        try:
            prepared = await self._prepare(call, deadline, asked)
        except Unserved as error:
            self.is_unserved(call, str(error))
            return None
        except ApiError:
            raise
        except Exception as error:
            raise unreadable(error) from None
        return prepared if prepared and is_plain(call.body, prepared.rendered) else None

    def ask_for(self, call: Call, route: str, body: Mapping[str, Any], deadline: float) -> Ask:
        data = orjson.dumps(body)
        return Ask(
            model=call.model,
            route=route,
            body_for=lambda _: data,
            authorization=call.caller.authorization,
            pin=call.rollout_id,
            deadline=deadline,
        )

    def is_unserved(self, call: Call, why: str) -> None:
        """For a while such calls are asked of the chat route."""
        logger.info("%s", why)
        self._probed.discard(_kind(call))
        if len(self._unserved_until) >= MAX_MODELS:
            self._unserved_until.clear()
        self._unserved_until[_kind(call)] = asyncio.get_running_loop().time() + UNSERVED_SECONDS

    def remember(self, call: Call, sampled: Sampled) -> None:
        """What the agent got: the next call may continue it. Raises nothing: the call is recorded."""
        try:
            messages = {choice["index"]: choice["message"] for choice in sampled.response["choices"]}
            for choice in sampled.generated:
                self._remember(call, sampled.prepared, messages[choice["index"]], choice["token_ids"], choice)
        except Exception as error:
            logger.error("an answer could not be remembered: %s", where(error))

    async def remember_stream(self, call: Call, translation: Translation, outcome: Outcome, deadline: float) -> None:
        """The same of a stream that came to its end. Raises nothing: the agent has its answer."""
        try:
            answers = {at: end | {"token_ids": outcome.choices[at].token_ids} for at, end in translation.ends.items()}
            await self._learn_ends(call, list(answers.values()), deadline)
            for at, end in answers.items():
                message = outcome.choices[at].output
                self._remember(call, translation.prepared, message, end["token_ids"] or [], end)
        except (ApiError, Unserved) as error:
            logger.info("a conversation will go on with tokens written anew: %s", error)
        except Exception as error:
            logger.error("an answer could not be remembered: %s", where(error))

    def _remember(self, call: Call, prepared: Prepared, message: Json, response: list[int], end: Json) -> None:
        ends = self._end_texts.get(call.model, {})
        self._conversations.remember(
            _attempt(call),
            call.body["messages"],
            message,
            rendered=prepared.rendered["token_ids"],
            prompt=prepared.prompt,
            response=response,
            end_text=ends.get(response[-1]) if ends_turn(call.body, end) else None,
            ends=ends,
        )

    async def _prepare(self, call: Call, deadline: float, asked: list[Served]) -> Prepared | None:
        body = {name: value for name, value in call.body.items() if name not in ("stream", "stream_options")}
        rendered = await self._ask(call, RENDER, body, deadline, asked)
        if rendered is None or not can_splice(rendered):
            return None  # the chat route says what is wrong with it
        if call.model not in self._end_texts:
            await self._probe_ends(call, deadline)
        if _kind(call) not in self._probed:
            await self._probe_routes(call, rendered, deadline)
        prompt = self._prompt(call, rendered["token_ids"])
        return Prepared(rendered, prompt, generate_request(call.body, rendered, prompt))

    async def _sample(self, call: Call, deadline: float, asked: list[Served]) -> Sampled | None:
        prepared = await self._prepare(call, deadline, asked)
        if prepared is None:
            return None
        generated = await self._ask(call, GENERATE, prepared.request, deadline, asked)
        if generated is None:
            return None
        derendered = await self._put_into_words(call, prepared, generated, deadline)
        ends = self._end_texts.get(call.model, {})
        response = chat_completion(call.body, prepared.rendered, prepared.prompt, generated, derendered, ends)
        return Sampled(asked[-1], response, prepared, generated["choices"])

    async def _put_into_words(self, call: Call, prepared: Prepared, generated: Json, deadline: float) -> Json | None:
        """None where its text is the answer. Raises ApiError, never Unserved: another route would sample again."""
        wanted: Json | None = None
        try:
            await self._learn_ends(call, generated["choices"], deadline)
        except Unserved as error:
            self.is_unserved(call, str(error))  # this answer can do without
        if not is_plain(call.body, prepared.rendered):
            wanted = derender_request(call.body, generated, prepared.prompt)
        if wanted is None:
            return None
        try:
            derendered = await self._ask(call, DERENDER, wanted, deadline, [])
        except Unserved as error:
            self.is_unserved(call, str(error))
            derendered = None
        if derendered is None:
            raise invalid("could not be put into words by the server that gave it")
        return derendered

    def _prompt(self, call: Call, rendered: list[int]) -> list[int]:
        turn = self._conversations.find(_attempt(call), call.body["messages"])
        if turn is None:
            self._metrics.prompt("begins")
            return rendered
        try:
            prompt = list(splice(turn, tokens(rendered)))
        except NotContinued as error:
            self._metrics.prompt(error.reason)
            return rendered
        self._metrics.prompt("continues")
        return prompt

    async def _probe_ends(self, call: Call, deadline: float) -> None:
        """With which token the template closes an answer: also one that was cut off can then be continued."""
        written: list[list[int]] = []
        for answer in PROBES:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
            body = {"model": call.model, "messages": messages, "add_generation_prompt": False}
            if (rendered := await self._ask(call, RENDER, body, deadline, [])) is None:
                break  # a template that wants other messages; ends are learned from answers
            written.append(rendered["token_ids"])
        closing = after_answer(*written) if len(written) == len(PROBES) else []
        await self._learn(call, set(closing[:1]), deadline)

    async def _probe_routes(self, call: Call, rendered: Json, deadline: float) -> None:
        """Whether the routes are there that are asked once an answer is sampled: with the prompt's last token as the
        answer, of which only the status counts. Raises Unserved."""
        ids = rendered["token_ids"][-1:]
        asked: dict[str, Json] = {DETOKENIZE: {"model": call.model, "tokens": ids}}
        choice: Json = {"index": 0, "token_ids": ids, "finish_reason": "length", "logprobs": None}
        answer: Json = {"request_id": rendered.get("request_id"), "model": call.model, "choices": [choice]}
        if not is_plain(call.body, rendered) and (wanted := derender_request(call.body, answer, ids)):
            asked[DERENDER] = wanted
        for route, body in asked.items():
            async with self._backends.open(self.ask_for(call, route, body, deadline)) as exchange:
                await read_all(exchange)
            if exchange.status in UNSERVED:
                raise _unserved(call, exchange, route)
        if len(self._probed) >= MAX_MODELS:
            self._probed.clear()
        self._probed.add(_kind(call))

    async def _learn_ends(self, call: Call, choices: Sequence[Json], deadline: float) -> None:
        """Which tokens closed a turn here."""
        await self._learn(call, {each["token_ids"][-1] for each in choices if ends_turn(call.body, each)}, deadline)

    async def _learn(self, call: Call, ends: set[int], deadline: float) -> None:
        """How they are written; asked once a token."""
        known = self._end_texts.setdefault(call.model, {})
        if len(self._end_texts) > MAX_MODELS:
            self._end_texts = {call.model: known}
        for token in ends - known.keys():
            body = {"model": call.model, "tokens": [token]}
            if found := await self._ask(call, DETOKENIZE, body, deadline, []):
                known[token] = found["prompt"]

    async def _ask(
        self, call: Call, route: str, body: Mapping[str, Any], deadline: float, asked: list[Served]
    ) -> Json | None:
        """The answer; None for a 400, which the chat route will explain. Raises Unserved, and ApiError for others."""
        async with self._backends.open(self.ask_for(call, route, body, deadline)) as exchange:
            asked.append(served_by(exchange))
            answer = await read_all(exchange)
        if exchange.status in UNSERVED:
            raise _unserved(call, exchange, route)
        if exchange.status in (400, 422):
            return None
        if exchange.status != 200:
            raise backend_error(exchange.status, answer)
        found = parse_answer(answer)
        if not isinstance(found, dict) or not _SHAPES[route](found):
            raise invalid(f"to {route} is in no shape known here")
        return found


def _unserved(call: Call, exchange: Exchange, route: str) -> Unserved:
    return Unserved(f"{exchange.endpoint} answers {route} with {exchange.status}: {call.model} is asked by text")


def _is_rendered(answer: Json) -> bool:
    ids = answer.get("token_ids")
    return isinstance(ids, list) and are_ids(ids) and isinstance(answer.get("sampling_params"), dict)


def _has_choices(answer: Json) -> bool:
    choices = answer.get("choices")
    return isinstance(choices, list) and all(
        isinstance(choice, dict) and isinstance(choice.get("index"), int) for choice in choices
    )


def _is_generated(answer: Json) -> bool:
    if not _has_choices(answer):
        return False
    return all(isinstance(choice.get("token_ids"), list) for choice in answer["choices"])


def _is_derendered(answer: Json) -> bool:
    return _has_choices(answer) and all(isinstance(choice.get("message"), dict) for choice in answer["choices"])


_SHAPES: Final[dict[str, Callable[[Json], bool]]] = {
    RENDER: _is_rendered,
    GENERATE: _is_generated,
    DERENDER: _is_derendered,
    DETOKENIZE: lambda answer: isinstance(answer.get("prompt"), str),
}


def _kind(call: Call) -> tuple[str, bool]:
    """Calls with tools need a route more."""
    return call.model, bool(call.body.get("tools"))


def _attempt(call: Call) -> tuple[str, ...]:
    return call.rollout_id, call.attempt_id, call.agent, call.model

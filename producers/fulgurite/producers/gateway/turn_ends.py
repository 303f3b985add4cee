"""With which tokens a model closes its turns, and how those are written: asked of its server, once a form and token.

What closes an answer is found in two ways: by answers that the template writes (closings.py; of text before the first
answer, so that one that is cut off can be continued), and by answers that ended by themselves (`learn`): where calls
are closed by another token than texts, only the policy shows with which. A form of answers (text, tool calls,
reasoning) can be continued only where the template closes it once, at its very end, with a token that no text is
tokenised to.

A form is asked about once, for all calls that want to know, in time of its own: an agent that hangs up, or waits for
less, ends nothing and proves nothing. What a server fails at is tried again a few times, then after a while; that it is
away or too slow does not count. Who sends other template arguments with each call finds out about few of them, and
takes nothing of others.

Bounded: models by number, then all are forgotten; forms by number, the one not asked for longest goes first.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Final

import orjson

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.closings import Written, closing, opening, read
from fulgurite.producers.gateway.continuation import Closing, Form
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols.base import Json
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import DETOKENIZE, RENDER, ends_turn

PROBES: Final = (("a", "?"), ("b", "?"), ("a", "!"))
"""Answers that differ in everything, down to their text's last token, whatever the tokenizer; and what follows them."""
MAX_MODELS: Final = 1_000
MAX_FORMS: Final = 10_000
MAX_CALLS: Final = 16
"""Tool calls of an answer that can be continued."""
MAX_TRIES: Final = 5
"""To find out how a form is closed, before the server is left alone with it."""
TRIES_SECONDS: Final = 60.0
"""For so long, since the last of them."""
PROBE_SECONDS: Final = 60.0
"""Longest that finding out may take."""
UNSURE: Final = frozenset({408, 429, 503, 504})
"""Of an ApiError that says nothing of the form: nobody was there, or too much was going on."""
MAX_VARIANTS: Final = 64
"""Of a model, as its calls bring template arguments that were not known: asked about in VARIANTS_SECONDS."""
MAX_VARIANTS_OF_ROLLOUT: Final = 8
VARIANTS_SECONDS: Final = 60.0
TEXT: Final[Form] = (True, 0, False)
_SPECIAL: Final = re.compile(r"(<\S+>|\[\S+\])")
_OF_TEMPLATE: Final = ("chat_template", "chat_template_kwargs", "reasoning_effort")
_ROLES: Final = frozenset({"user", "tool", "system", "developer", "assistant"})
"""Of a message after an answer, that are asked about."""

_Key = tuple[str, Form, str, bytes]


class _NotNow(Exception):
    """It is not known, and this call does not find out."""


class TurnEnds:
    def __init__(self, asker: TokenAsker) -> None:
        self._asker = asker
        self._texts: dict[str, dict[int, str]] = {}
        self._written: OrderedDict[_Key, Written | None] = OrderedDict()
        self._failures: OrderedDict[_Key, tuple[int, float]] = OrderedDict()
        """In a row, and when the last was."""
        self._probes: dict[_Key, asyncio.Task[Written | None]] = {}
        self._variants: Counter[tuple[str, str]] = Counter()
        """Asked about since `_variants_since`, by model and rollout, and by model."""
        self._variants_since = float("-inf")

    def known(self, model: str) -> dict[int, str]:
        """Of a model, as far as it was asked: token -> text."""
        return self._texts.get(model, {})

    async def closing(
        self, call: Call, form: Form, deadline: float, *, follows: str = "", sampled: int | None = None
    ) -> Closing | None:
        """How the template closes answers of this form before a message of the role `follows` (none: before whatever
        comes), where the policy ended one with the token `sampled`; None where that is not known, or not within half of
        the time that is left. Raises Unserved; ApiError, and then asks again the next time, MAX_TRIES times."""
        now = asyncio.get_running_loop().time()
        until = now + max(deadline - now, 0.0) / 2
        usual = "tool" if form[1] else "user"
        try:
            found = self._closing(call, await self._found(call, form, usual, until), sampled)
            # A token that is not the answer's own is that of the next message, which some write into the same turn.
            if found and follows not in ("", usual) and (not found.own or follows == "assistant"):
                written = await self._found(call, form, follows, until) if follows in _ROLES else None
                found = self._closing(call, written, sampled)
        except _NotNow:
            return None
        return found

    def _closing(self, call: Call, written: Written | None, sampled: int | None) -> Closing | None:
        known = self.known(call.model)
        found = closing(written, known.keys(), sampled) if written else None
        return found if found and _is_special(known[found.token]) else None

    async def _found(self, call: Call, form: Form, follows: str, deadline: float) -> Written | None:
        """The same. Raises _NotNow where it is not found out."""
        of_template = {name: call.body[name] for name in _OF_TEMPLATE if call.body.get(name)}
        variant = blake2b(orjson.dumps(of_template), digest_size=16).digest() if of_template else b""
        key = call.model, form, follows, variant
        if key in self._written:
            self._written.move_to_end(key)
            return self._written[key]
        loop = asyncio.get_running_loop()
        probe = self._probes.get(key)
        if probe is None:
            if form[1] > MAX_CALLS or not self._may_try(key, loop.time()):
                raise _NotNow
            if variant and not self._may_vary(call, loop.time()):
                raise _NotNow
            probe = self._probes[key] = loop.create_task(self._probe(key, call, of_template))
            probe.add_done_callback(_looked_at)
        # Not ended with who waits for it: others do, or will ask next.
        await asyncio.wait({probe}, timeout=deadline - loop.time())
        if not probe.done():
            raise _NotNow
        return probe.result()

    async def _probe(self, key: _Key, call: Call, of_template: Json) -> Written | None:
        loop = asyncio.get_running_loop()
        try:
            found = await self._ask(call, key[1], key[2], of_template, loop.time() + PROBE_SECONDS)
        except ApiError as error:
            if error.status not in UNSURE:
                failures, _ = self._failures.pop(key, (0, 0.0))
                self._failures[key] = failures + 1, loop.time()
                if len(self._failures) > MAX_FORMS:
                    self._failures.popitem(last=False)
            raise
        finally:
            del self._probes[key]
        self._failures.pop(key, None)
        self._written[key] = found
        if len(self._written) > MAX_FORMS:
            self._written.popitem(last=False)
        return found

    def _may_try(self, key: _Key, now: float) -> bool:
        failures, last_at = self._failures.get(key, (0, now))
        if now - last_at >= TRIES_SECONDS:
            del self._failures[key]
            return True
        return failures < MAX_TRIES

    def _may_vary(self, call: Call, now: float) -> bool:
        """Whether a question about template arguments that are new is within its bounds, and counts it."""
        if now - self._variants_since >= VARIANTS_SECONDS:
            self._variants_since = now
            self._variants.clear()
        of_all, of_rollout = (call.model, ""), (call.model, call.rollout_id)
        if self._variants[of_all] >= MAX_VARIANTS or self._variants[of_rollout] >= MAX_VARIANTS_OF_ROLLOUT:
            return False
        self._variants[of_all] += 1
        self._variants[of_rollout] += 1
        return True

    async def _ask(self, call: Call, form: Form, follows: str, of_template: Json, deadline: float) -> Written | None:
        async def write(*messages: Json, to_answer: bool = False) -> list[int] | None:
            body: Json = of_template | {"model": call.model, "messages": messages, "add_generation_prompt": to_answer}
            rendered = await self._asker.ask(call, RENDER, body, deadline)
            return None if rendered is None else rendered["token_ids"]

        of_texts = None
        question: Json = {"role": "user", "content": "?"}
        if (form, follows) != (TEXT, "user"):
            if (of_texts := await self._found(call, TEXT, "user", deadline)) is None:
                return None
            start = of_texts.opening
        elif (asked := await write(question, to_answer=True)) and (not_asked := await write(question)):
            start = opening(asked, not_asked)
        else:
            return None
        answered = [await write(question, *_answered(form, *said, follows)) for said in PROBES]
        one, other, followed = answered
        if one is None or other is None or followed is None:
            return None  # a template that wants other messages
        alone = await write(question, _answered(form, "a", "", "")[0], to_answer=True)
        written = read(start, one, other, followed, alone)
        if written is None or (form[0] and one == other):
            return None
        if of_texts:
            # The history may be written either way, once more is asked.
            return replace(written, dropped=max(written.dropped, of_texts.dropped, key=len))
        # Calls and reasoning may have an end of their own before the answer's: only text shows which token that is.
        await self._learn(call, set(written.tail[:1]), deadline, only_special=True)
        return written

    async def learn(self, call: Call, choices: Sequence[Json], deadline: float) -> None:
        """Which tokens closed a turn here. Raises Unserved, ApiError."""
        await self._learn(call, {each["token_ids"][-1] for each in choices if ends_turn(call.body, each)}, deadline)

    async def _learn(self, call: Call, ends: set[int], deadline: float, *, only_special: bool = False) -> None:
        known = self._texts.setdefault(call.model, {})
        if len(self._texts) > MAX_MODELS:
            self._texts = {call.model: known}
        for token in ends - known.keys():
            body = {"model": call.model, "tokens": [token]}
            found = await self._asker.ask(call, DETOKENIZE, body, deadline)
            if found and (not only_special or _is_special(found["prompt"])):
                known[token] = found["prompt"]


def _looked_at(probe: asyncio.Task[Written | None]) -> None:
    """Its error is told to who waits for it, if anybody still does."""
    if not probe.cancelled():
        probe.exception()


def _is_special(text: str) -> bool:
    """Whether no text is tokenised to the token."""
    return bool(_SPECIAL.fullmatch(text.strip()))


def _answered(form: Form, said: str, then: str, follows: str) -> list[Json]:
    """An answer of this form, and what follows it."""
    has_text, calls, reasons = form
    answer: Json = {"role": "assistant", "content": said if has_text else ""}
    if reasons:
        answer["reasoning"] = answer["reasoning_content"] = said
    ids = [f"call{number:05}" for number in range(calls)]  # Mistral's templates want nine characters
    if calls:
        function = {"name": "f", "arguments": orjson.dumps({"x": said}).decode()}
        answer["tool_calls"] = [{"id": one, "type": "function", "function": function} for one in ids]
    if follows != "tool":
        return [answer, {"role": follows, "content": then}]
    return [answer, *({"role": "tool", "tool_call_id": one, "content": then} for one in ids or ("call00000",))]

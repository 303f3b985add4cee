"""With which tokens a model closes its turns, and how those are written: asked of its server, once a form and token.

What closes an answer is found in two ways: by answers that the template writes (`closing`; of text before the first
answer, so that one that is cut off can be continued), and by answers that ended by themselves (`learn`). A form of
answers (text, tool calls, reasoning) can be continued only where the template closes it once, at its very end, with a
token that no text is tokenised to. What fails is tried again a few times.

Bounded: models by number, then all are forgotten; forms by number, then the others cannot be continued.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import orjson

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.continuation import Form
from fulgurite.producers.gateway.protocols.base import Json
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import DETOKENIZE, RENDER, after_answer, ends_turn

PROBES: Final = (("a", "?"), ("b", "?"), ("a", "!"))
"""Answers that differ in everything, down to their text's last token, whatever the tokenizer; and what follows them."""
MAX_MODELS: Final = 1_000
MAX_FORMS: Final = 10_000
MAX_CALLS: Final = 16
"""Tool calls of an answer that can be continued."""
MAX_TRIES: Final = 5
"""To find out how a form is closed, before the server is taken at its word."""
TEXT: Final[Form] = (True, 0, False)
_SPECIAL: Final = re.compile(r"(<\S+>|\[\S+\])")
_OF_TEMPLATE: Final = ("chat_template", "chat_template_kwargs")

_Key = tuple[str, Form, bytes]


class TurnEnds:
    def __init__(self, asker: TokenAsker) -> None:
        self._asker = asker
        self._texts: dict[str, dict[int, str]] = {}
        self._closings: dict[_Key, int | None] = {}
        self._tries: dict[_Key, int] = {}

    def known(self, model: str) -> dict[int, str]:
        """Of a model, as far as it was asked: token -> text."""
        return self._texts.get(model, {})

    async def closing(self, call: Call, form: Form, deadline: float) -> int | None:
        """With which token alone the template closes answers of this form, None where that is not known. Raises
        Unserved; ApiError, and then asks again the next time, MAX_TRIES times in all."""
        of_template = {name: call.body[name] for name in _OF_TEMPLATE if call.body.get(name)}
        key = call.model, form, orjson.dumps(of_template)
        if key in self._closings:
            return self._closings[key]
        if self._tries.get(key, 0) >= MAX_TRIES or form[1] > MAX_CALLS or len(self._tries) >= MAX_FORMS:
            return None
        self._tries[key] = self._tries.get(key, 0) + 1
        found = await self._closing(call, form, of_template, deadline)
        self._closings[key] = found
        return found

    async def _closing(self, call: Call, form: Form, of_template: Json, deadline: float) -> int | None:
        question = {"role": "user", "content": "?"}
        conversations = [[question]]
        conversations += [[question, *_answered(form, *said)] for said in PROBES]
        written: list[list[int]] = []
        for messages in conversations:
            body = of_template | {
                "model": call.model,
                "messages": messages,
                "add_generation_prompt": len(messages) == 1,
            }
            if (rendered := await self._asker.ask(call, RENDER, body, deadline)) is None:
                return None  # a template that wants other messages
            written.append(rendered["token_ids"])
        prompt, one, other, followed = written
        tail = after_answer(one, other)
        if not tail or one == other:
            return None
        # Calls and reasoning may have an end of their own before the answer's: only text shows which token that is.
        token = tail[0] if form == TEXT else await self.closing(call, TEXT, deadline)
        if token is None:
            return None
        await self._learn(call, {token}, deadline)
        closed = one[_alike(prompt, one) : _alike(one, followed)].count(token)
        in_tail = token in one[len(one) - len(tail) : _alike(one, followed)]
        text = self.known(call.model).get(token, "")
        return token if closed == 1 and in_tail and _SPECIAL.fullmatch(text.strip()) else None

    async def learn(self, call: Call, choices: Sequence[Json], deadline: float) -> None:
        """Which tokens closed a turn here. Raises Unserved, ApiError."""
        await self._learn(call, {each["token_ids"][-1] for each in choices if ends_turn(call.body, each)}, deadline)

    async def _learn(self, call: Call, ends: set[int], deadline: float) -> None:
        known = self._texts.setdefault(call.model, {})
        if len(self._texts) > MAX_MODELS:
            self._texts = {call.model: known}
        for token in ends - known.keys():
            body = {"model": call.model, "tokens": [token]}
            if found := await self._asker.ask(call, DETOKENIZE, body, deadline):
                known[token] = found["prompt"]


def _alike(one: list[int], other: list[int]) -> int:
    """In how many tokens they begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


def _answered(form: Form, said: str, then: str) -> list[Json]:
    """An answer of this form, and what follows it."""
    has_text, calls, reasons = form
    answer: Json = {"role": "assistant", "content": said if has_text else ""}
    if reasons:
        answer["reasoning"] = answer["reasoning_content"] = said
    if not calls:
        return [answer, {"role": "user", "content": then}]
    ids = [f"call{number:05}" for number in range(calls)]  # Mistral's templates want nine characters
    function = {"name": "f", "arguments": orjson.dumps({"x": said}).decode()}
    answer["tool_calls"] = [{"id": one, "type": "function", "function": function} for one in ids]
    return [answer, *({"role": "tool", "tool_call_id": one, "content": then} for one in ids)]

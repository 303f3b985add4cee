"""With which tokens a model closes its turns, and how those are written: asked of its server, once a token.

What closes an answer is found in two ways: by an answer that the template writes (`probe`), and by answers that ended
by themselves (`learn`). Bounded: models by number, then all are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.protocols.base import Json
from fulgurite.producers.gateway.token_asking import TokenAsker
from fulgurite.producers.gateway.token_route import DETOKENIZE, RENDER, after_answer, ends_turn

PROBES: Final = ("a", "b")
"""Answers that differ in their last token, whatever the tokenizer."""
MAX_MODELS: Final = 1_000


class TurnEnds:
    def __init__(self, asker: TokenAsker) -> None:
        self._asker = asker
        self._texts: dict[str, dict[int, str]] = {}

    def known(self, model: str) -> dict[int, str]:
        """Of a model, as far as it was asked: token -> text."""
        return self._texts.get(model, {})

    async def probe(self, call: Call, deadline: float) -> None:
        """With which token the template closes an answer: also one that was cut off can then be continued. Once a
        model. Raises Unserved, ApiError."""
        if call.model in self._texts:
            return
        written: list[list[int]] = []
        for answer in PROBES:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
            body = {"model": call.model, "messages": messages, "add_generation_prompt": False}
            if (rendered := await self._asker.ask(call, RENDER, body, deadline)) is None:
                break  # a template that wants other messages; ends are learned from answers
            written.append(rendered["token_ids"])
        closing = after_answer(*written) if len(written) == len(PROBES) else []
        await self._learn(call, set(closing[:1]), deadline)

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

"""The ids of tool calls, in the form that the model's own template wants back. See token_flow.py.

DERENDER makes up ids of a form of its own (vLLM 0.32) and drops those of its parser, which matter: Mistral's templates
refuse any but nine letters and digits, and Kimi writes its ids into the answer and reads them in the next prompt. As a
stream DERENDER gives the parser's own, so it is asked for all of an answer as one piece, of which only the ids count.

Once a model's parser is seen to make its ids at random, as most do, such are made here. Where nothing is found out they
are of nine letters and digits, which no template is known to refuse. Bounded: models by number, then all are forgotten.
"""

from __future__ import annotations

import logging
import re
import secrets
import string
from collections.abc import Mapping
from typing import Any, Final

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols.base import Json
from fulgurite.producers.gateway.token_asking import TokenAsker, Unserved
from fulgurite.producers.gateway.token_route import DERENDER

logger = logging.getLogger(__name__)

MAX_MODELS: Final = 1_000
_RANDOM: Final = re.compile(r"chatcmpl-tool-[0-9a-f]+")
"""Of vLLM's make_tool_call_id, where a model's ids have no form of their own."""
_LETTERS: Final = string.ascii_letters + string.digits


class ToolCallIds:
    def __init__(self, asker: TokenAsker) -> None:
        self._asker = asker
        self._at_random: set[str] = set()
        """Models whose parsers make ids so."""

    async def put_in(self, call: Call, wanted: Json, derendered: Json, deadline: float) -> None:
        """Into the calls of what DERENDER answered to `wanted`."""
        given = {choice["index"]: choice for choice in wanted["generate_response"]["choices"]}
        for choice in derendered["choices"]:
            calls = choice["message"].get("tool_calls")
            if not isinstance(calls, list) or not calls:
                continue
            found = await self._of_parser(call, wanted, given.get(choice["index"], {}), deadline)
            for at, each in enumerate(calls):
                if isinstance(each, dict):
                    each["id"] = found.get((at, _name(each))) or self._made(call.model)

    async def _of_parser(
        self, call: Call, wanted: Json, choice: Json, deadline: float
    ) -> Mapping[tuple[int, str], str]:
        """By number and name of the call, as far as they are told."""
        if call.model in self._at_random:
            return {}
        piece = {name: choice.get(name) for name in ("index", "token_ids", "finish_reason", "stop_reason")}
        body = {name: value for name, value in wanted.items() if name != "generate_response"}
        body |= {"stream": True, "generate_chunk": {"choices": [piece]}}
        try:
            answer = await self._asker.ask(call, DERENDER, body, deadline)
        except (ApiError, Unserved) as error:
            logger.info("the ids of tool calls of %s could not be asked: %s", call.model, error)
            return {}
        found = _ids(answer) if answer else {}
        if found and all(map(_RANDOM.fullmatch, found.values())):
            if len(self._at_random) >= MAX_MODELS:
                self._at_random.clear()
            self._at_random.add(call.model)
        return found

    def _made(self, model: str) -> str:
        if model in self._at_random:
            return f"chatcmpl-tool-{secrets.token_hex(8)}"
        return "".join(secrets.choice(_LETTERS) for _ in range(9))


def _ids(answer: Json) -> dict[tuple[int, str], str]:
    found: dict[tuple[int, str], str] = {}
    for choice in answer["chunk"]["choices"]:
        delta = choice.get("delta")
        for each in (delta.get("tool_calls") if isinstance(delta, dict) else None) or ():
            if isinstance(each, dict) and isinstance(each.get("id"), str) and isinstance(each.get("index"), int):
                found[each["index"], _name(each)] = each["id"]
    return found


def _name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name")) if isinstance(function, dict) else ""

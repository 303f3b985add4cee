"""The ids of tool calls, in the form that the model's own template wants back. See token_flow.py.

DERENDER makes up ids of a form of its own (vLLM 0.32) and drops those of its parser, which matter: Mistral's templates
refuse any but nine letters and digits, and Kimi writes its ids into the answer and reads them in the next prompt. As a
stream DERENDER gives the parser's own, so it is asked for all of an answer as one piece, of which only the ids count.

A parser that gives the same tokens other ids when it is asked again makes them at random, as most do: then they are
made here, and it is asked no more. Where nothing is found out, they are of nine letters and digits, which no template
is known to refuse, and it is asked again after a while. Bounded: models by number, then all are forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.protocols.base import Json
from fulgurite.producers.gateway.token_asking import TokenAsker, Unserved
from fulgurite.producers.gateway.token_route import DERENDER

logger = logging.getLogger(__name__)

MAX_MODELS: Final = 1_000
SILENT_SECONDS: Final = 60.0
"""A parser that told nothing of the calls it found is asked again after this."""
_OF_VLLM: Final = re.compile(r"chatcmpl-tool-[0-9a-f]+")
"""vLLM's own form, where a model's ids have none."""
_LETTERS: Final = string.ascii_letters + string.digits

_Ids = Mapping[tuple[int, str], str]
"""By number and name of the call."""


@dataclass(slots=True)
class _Parser:
    """What is known of one model's."""

    tells: bool = False
    """Its ids are of what the model wrote, or of the calls before: it has to be asked."""
    at_random: bool = False
    of_vllm: bool = False
    """And in vLLM's own form."""
    silent_until: float = 0.0

    def made(self) -> str:
        if self.of_vllm:
            return f"chatcmpl-tool-{secrets.token_hex(8)}"
        return "".join(secrets.choice(_LETTERS) for _ in range(9))


class ToolCallIds:
    def __init__(self, asker: TokenAsker) -> None:
        self._asker = asker
        self._parsers: dict[str, _Parser] = {}
        """By model."""

    async def put_in(self, call: Call, wanted: Json, derendered: Json, deadline: float) -> None:
        """Into the calls of what DERENDER answered to `wanted`."""
        given = {choice["index"]: choice for choice in wanted["generate_response"]["choices"]}
        for choice in derendered["choices"]:
            calls = choice["message"].get("tool_calls")
            if not isinstance(calls, list) or not calls:
                continue
            parser = self._parser(call.model)
            found = await self._told(call, parser, _as_stream(wanted, given.get(choice["index"], {})), deadline)
            for at, each in enumerate(calls):
                if isinstance(each, dict):
                    each["id"] = found.get((at, _name(each))) or parser.made()

    def _parser(self, model: str) -> _Parser:
        if model not in self._parsers:
            if len(self._parsers) >= MAX_MODELS:
                self._parsers.clear()
            self._parsers[model] = _Parser()
        return self._parsers[model]

    async def _told(self, call: Call, parser: _Parser, body: Json, deadline: float) -> _Ids:
        """As far as the parser tells them."""
        now = asyncio.get_running_loop().time()
        if parser.at_random or (parser.silent_until > now and not parser.tells):
            return {}
        found = await self._ask(call, body, deadline)
        if not found:
            parser.silent_until = now + SILENT_SECONDS
        elif all(map(_OF_VLLM.fullmatch, found.values())):
            parser.at_random = parser.of_vllm = True
        elif not parser.tells and (again := await self._ask(call, body, deadline)):
            parser.at_random = not set(again.values()) & set(found.values())
            parser.tells = not parser.at_random
        return found

    async def _ask(self, call: Call, body: Json, deadline: float) -> _Ids:
        try:
            answer = await self._asker.ask(call, DERENDER, body, deadline)
        except (ApiError, Unserved) as error:
            logger.info("the ids of tool calls of %s could not be asked: %s", call.model, error)
            return {}
        return _ids(answer) if answer else {}


def _as_stream(wanted: Json, choice: Json) -> Json:
    piece = {name: choice.get(name) for name in ("index", "token_ids", "finish_reason", "stop_reason")}
    body = {name: value for name, value in wanted.items() if name != "generate_response"}
    return body | {"stream": True, "generate_chunk": {"choices": [piece]}}


def _ids(answer: Json) -> _Ids:
    found: dict[tuple[int, str], str] = {}
    for choice in answer["chunk"]["choices"]:
        delta = choice.get("delta")
        calls = delta.get("tool_calls") if isinstance(delta, dict) else None
        for each in calls if isinstance(calls, list) else ():
            if isinstance(each, dict) and isinstance(each.get("id"), str) and isinstance(each.get("index"), int):
                found[each["index"], _name(each)] = each["id"]
    return found


def _name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name")) if isinstance(function, dict) else ""

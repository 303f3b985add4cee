"""The protocols agents may speak, by their route. Each file: what to ask, how to read an answer or fold its events,
what to take out of it again."""

from __future__ import annotations

from typing import Final

from fulgurite.producers.gateway.protocols.base import Api
from fulgurite.producers.gateway.protocols.chat import ChatApi
from fulgurite.producers.gateway.protocols.completions import CompletionsApi
from fulgurite.producers.gateway.protocols.messages import MessagesApi
from fulgurite.producers.gateway.protocols.responses import ResponsesApi

CHAT: Final = ChatApi()
BY_ROUTE: Final[dict[str, Api]] = {api.route: api for api in (CHAT, CompletionsApi(), ResponsesApi(), MessagesApi())}

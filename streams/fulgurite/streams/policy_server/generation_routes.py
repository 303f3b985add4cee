"""The routes that sample, and those that turn messages and texts into tokens and back. See app.py for the table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from fulgurite.schemas.settings import PolicyServerSettings
from fulgurite.streams.policy_server.answers import Asked
from fulgurite.streams.policy_server.bodies import Handlers, as_json, read_body
from fulgurite.streams.policy_server.chat import parse_chat, render_chat
from fulgurite.streams.policy_server.completions import parse_completion
from fulgurite.streams.policy_server.generate import parse_generate
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.prompts import chat_prompt, text_prompt, token_ids
from fulgurite.streams.policy_server.protocol import BadRequest, Json, check_model, flag, parse_json
from fulgurite.streams.policy_server.streaming import EventStream, events, while_connected
from fulgurite.streams.policy_server.worker import NotReady, Worker

_CLIENT_CLOSED = 499
"""Nginx's number for a client that went away; nobody reads it."""

Read = TypeVar("Read")

_MAX_INLINE_BYTES = 8 * 1024
"""Of a body that is read on the event loop: tokenising it takes a few milliseconds."""

Parse = Callable[[Json, Policy, str, int], Asked]


class GenerationRoutes:
    def __init__(self, worker: Worker, settings: PolicyServerSettings) -> None:
        self._worker = worker
        self._name = settings.served_model_name
        self._max_new_tokens = settings.max_new_tokens
        self._reading_large = asyncio.Lock()

    def handlers(self) -> Handlers:
        return [
            ("POST", "/v1/chat/completions", lambda request: self._answer(request, parse_chat)),
            ("POST", "/v1/completions", lambda request: self._answer(request, parse_completion)),
            ("POST", "/inference/v1/generate", lambda request: self._answer(request, parse_generate)),
            ("POST", "/v1/chat/completions/render", self.render),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
        ]

    async def _answer(self, request: Request, parse: Parse) -> Response:
        asked = await self._read(request, lambda body, policy: parse(body, policy, self._name, self._max_new_tokens))
        underway = self._worker.submit(asked.generations, asked.stream)
        if asked.stream:
            return EventStream(events(asked, underway), lambda: self._worker.close(underway))
        try:
            if not await while_connected(underway.finished(), request.receive):
                return Response(status_code=_CLIENT_CLOSED)
        finally:
            self._worker.close(underway)
        return as_json(asked.body())

    async def render(self, request: Request) -> Response:
        return as_json(
            await self._read(request, lambda body, policy: render_chat(body, policy, self._name, self._max_new_tokens))
        )

    async def tokenize(self, request: Request) -> Response:
        return as_json(await self._read(request, self._tokens))

    def _tokens(self, body: Json, policy: Policy) -> Json:
        check_model(body, self._name)
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            tokens = text_prompt(prompt, policy, flag(body, "add_special_tokens", True))
        elif "messages" in body:
            tokens = chat_prompt(body, policy)
        else:
            raise BadRequest("prompt must be a text, or messages must be there", "prompt")
        names = policy.tokenizer.convert_ids_to_tokens(tokens) if flag(body, "return_token_strs", False) else None
        return {"count": len(tokens), "max_model_len": policy.max_positions, "tokens": tokens, "token_strs": names}

    async def detokenize(self, request: Request) -> Response:
        return as_json(await self._read(request, self._text))

    def _text(self, body: Json, policy: Policy) -> Json:
        check_model(body, self._name)
        tokens = token_ids(body.get("tokens"), policy, "tokens")
        if len(tokens) > policy.max_positions:
            raise BadRequest(f"tokens has {len(tokens)}; the context holds {policy.max_positions}", "tokens")
        return {"prompt": policy.tokenizer.decode(tokens)}

    async def _read(self, request: Request, read: Callable[[Json, Policy], Read]) -> Read:
        """What `read` makes of the body: of a large one on a thread, so that steps, small requests and /health go on.

        One large body after the other: each may hold many times its size in tokens. A tokenizer may encode and decode
        for several threads at once; nothing here changes one.
        """
        content = await read_body(request)
        policy = self._policy()
        if len(content) <= _MAX_INLINE_BYTES:
            return read(parse_json(content), policy)
        async with self._reading_large:
            return await asyncio.to_thread(lambda: read(parse_json(content), policy))

    def _policy(self) -> Policy:
        policy = self._worker.policy
        if policy is None:
            raise NotReady("no weights are loaded yet")
        return policy

"""The routes that sample, and those that turn messages and texts into tokens and back. See app.py for the table."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from fulgurite.schemas.settings import PolicyServerSettings
from fulgurite.streams.policy_server.answers import Asked
from fulgurite.streams.policy_server.bodies import Handlers, as_json, json_body
from fulgurite.streams.policy_server.chat import parse_chat, render_chat
from fulgurite.streams.policy_server.completions import parse_completion
from fulgurite.streams.policy_server.generate import parse_generate
from fulgurite.streams.policy_server.policy import Policy
from fulgurite.streams.policy_server.prompts import chat_prompt, text_prompt, token_ids
from fulgurite.streams.policy_server.protocol import BadRequest, Json, check_model, flag
from fulgurite.streams.policy_server.streaming import EventStream, events, while_connected
from fulgurite.streams.policy_server.worker import NotReady, Worker

_CLIENT_CLOSED = 499
"""Nginx's number for a client that went away; nobody reads it."""

Parse = Callable[[Json, Policy, str, int], Asked]


class GenerationRoutes:
    def __init__(self, worker: Worker, settings: PolicyServerSettings) -> None:
        self._worker = worker
        self._name = settings.served_model_name
        self._max_new_tokens = settings.max_new_tokens

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
        body = await json_body(request)
        asked = parse(body, self._policy(), self._name, self._max_new_tokens)
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
        body = await json_body(request)
        return as_json(render_chat(body, self._policy(), self._name, self._max_new_tokens))

    async def tokenize(self, request: Request) -> Response:
        body = await json_body(request)
        policy = self._policy()
        check_model(body, self._name)
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            tokens = text_prompt(prompt, policy, flag(body, "add_special_tokens", True))
        elif "messages" in body:
            tokens = chat_prompt(body, policy)
        else:
            raise BadRequest("prompt must be a text, or messages must be there", "prompt")
        names = policy.tokenizer.convert_ids_to_tokens(tokens) if flag(body, "return_token_strs", False) else None
        answer = {"count": len(tokens), "max_model_len": policy.max_positions, "tokens": tokens, "token_strs": names}
        return as_json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = await json_body(request)
        policy = self._policy()
        check_model(body, self._name)
        return as_json({"prompt": policy.tokenizer.decode(token_ids(body.get("tokens"), policy, "tokens"))})

    def _policy(self) -> Policy:
        policy = self._worker.policy
        if policy is None:
            raise NotReady("no weights are loaded yet")
        return policy

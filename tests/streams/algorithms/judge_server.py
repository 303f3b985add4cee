"""A model behind OpenAI's chat completions, over real HTTP, that says what a function says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Reply = Callable[[str], str | int]
"""What the model says to a question: a text, or the status of a refusal."""


class ModelServer:
    """`url` is its base URL, `questions` what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.questions: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        question = str(body["messages"][-1]["content"])
        self.questions.append(question)
        said = self.reply(question)
        if isinstance(said, int):
            return web.json_response({"error": {"message": "no"}}, status=said)
        message = {"role": "assistant", "content": said}
        return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


@asynccontextmanager
async def model_server(reply: Reply) -> AsyncGenerator[ModelServer]:
    server = ModelServer(reply)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()

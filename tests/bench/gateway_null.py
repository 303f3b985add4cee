"""A policy server that does nothing, as cheaply as Python can: the load behind tests/bench/gateway.py.

    python tests/bench/gateway_null.py PORT

Answers a chat completion with 24 tokens, their logprobs and the version that sampled them; with `"stream":true` in 32
events of a token. `"pause_ms":N` in the request's body is how long it waits before an answer, and before each event of
a stream. Bodies are prepared: what it costs is a socket and a timer.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from typing import Any, Final, cast

import orjson
import uvloop

TOKENS: Final = 24
EVENTS: Final = 32
PROMPT_TOKENS: Final = 60
MAX_REQUEST_BYTES: Final = 1 << 20

_PAUSE: Final = re.compile(rb'"pause_ms":\s*([0-9.]+)')
_STREAM: Final = re.compile(rb'"stream":\s*true')
_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length:\s*([0-9]+)")


def _entry(logprob: float) -> dict[str, Any]:
    return {"token": "x", "logprob": logprob, "bytes": [120], "top_logprobs": []}


def _usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


def _answer() -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "CALC((37+56)*74)"},
        "finish_reason": "stop",
        "token_ids": list(range(TOKENS)),
        "logprobs": {"content": [_entry(-0.5 - at / 100) for at in range(TOKENS)]},
        "weight_versions": [{"version": "17", "start": 0, "end": TOKENS}],
    }
    return orjson.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "policy",
            "prompt_token_ids": list(range(PROMPT_TOKENS)),
            "choices": [choice],
            "usage": _usage(TOKENS),
        }
    )


def _events() -> list[bytes]:
    """One a token; the count of tokens, and the stream's end, go with the last."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "policy"}
    events: list[bytes] = []
    for at in range(EVENTS):
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": "x"} if at == 0 else {"content": "x"},
            "finish_reason": "stop" if at == EVENTS - 1 else None,
            "token_ids": [at],
            "logprobs": {"content": [_entry(-0.5)]},
            "weight_versions": [{"version": "17", "start": at, "end": at + 1}],
        }
        prompt = {"prompt_token_ids": list(range(PROMPT_TOKENS))} if at == 0 else {}
        events.append(b"data: " + orjson.dumps(head | prompt | {"choices": [choice]}) + b"\n\n")
    events[-1] += b"data: " + orjson.dumps(head | {"choices": [], "usage": _usage(EVENTS)}) + b"\n\n"
    events[-1] += b"data: [DONE]\n\n"
    return events


def _response(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


ANSWER: Final = _response(_answer())
MODELS: Final = _response(orjson.dumps({"object": "list", "data": [{"id": "policy", "object": "model"}]}))
HEALTHY: Final = _response(b"{}")
NO_ROUTE: Final = _response(b'{"error":{"message":"no such route"}}', "404 Not Found")
CHUNKS: Final = [b"%x\r\n%b\r\n" % (len(event), event) for event in _events()]
STREAM_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END: Final = b"0\r\n\r\n"


class NullBackend(asyncio.Protocol):
    """One connection: one request after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._read = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no asyncio class

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._read += data
        end = self._read.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(bytes(self._read[:end]))
        size = end + 4 + (int(length[1]) if length else 0)
        if size > MAX_REQUEST_BYTES:
            self._transport.close()
        elif len(self._read) >= size:
            request = bytes(self._read[:size])
            del self._read[:size]
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        path = request.split(b" ", 2)[1]
        if path != b"/v1/chat/completions":
            found = {b"/health": HEALTHY, b"/v1/models": MODELS}.get(path, NO_ROUTE)
            self._transport.write(found)
            return
        pause = _PAUSE.search(request)
        seconds = float(pause[1]) / 1000 if pause else 0.0
        if _STREAM.search(request):
            self._after(seconds, lambda: self._send_event(0, seconds))
        else:
            self._after(seconds, lambda: self._transport.write(ANSWER))

    def _send_event(self, at: int, seconds: float) -> None:
        begin = STREAM_HEAD if at == 0 else b""
        if at == EVENTS - 1:
            self._transport.write(begin + CHUNKS[at] + STREAM_END)
            return
        self._transport.write(begin + CHUNKS[at])
        self._after(seconds, lambda: self._send_event(at + 1, seconds))

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        if seconds:
            self._timer = self._loop.call_later(seconds, then)
        else:
            then()


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(NullBackend, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))

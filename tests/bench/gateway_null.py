"""A policy server that does nothing, as cheaply as Python can: the load behind tests/bench/gateway.py.

    python tests/bench/gateway_null.py PORT [--tokens]

Answers a chat completion with 24 tokens, their logprobs and the version that sampled them; with `"stream":true` in 32
events of a token. `"pause_ms":N` in the request's body is how long it waits before an answer, and before each event of
a stream. With --tokens it has the routes of token ids as a vLLM has them instead (and no chat route, so that nobody
measures that one by mistake): rendered by a template of bytes, answered with the same 24 tokens. Bodies are prepared,
but for what is rendered: what it costs is a socket and a timer.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, cast

import orjson
import uvloop

TOKENS: Final = 24
EVENTS: Final = 32
PROMPT_TOKENS: Final = 60
END: Final = 300
"""The token that closes a message; below 256 are bytes."""
ROLES: Final = {"system": 256, "user": 257, "assistant": 258, "tool": 259}
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


def _generated(choice: dict[str, Any]) -> dict[str, Any]:
    return {"request_id": "chatcmpl-1", "model": "policy", "created": 1, "choices": [{"index": 0} | choice]}


def _by_ids() -> bytes:
    """What the route that takes ids answers, in text: the same tokens as `_answer`, the last ends the turn."""
    entries = [_entry(-0.5 - at / 100) | {"token_id": at} for at in range(TOKENS)]
    choice = {
        "text": "CALC((37+56)*74)",
        "token_ids": [*range(TOKENS - 1), END],
        "logprobs": {"content": entries},
        "finish_reason": "stop",
        "stop_reason": None,
        "weight_versions": [{"version": "17", "start": 0, "end": TOKENS}],
    }
    return orjson.dumps(_generated(choice) | {"usage": _usage(TOKENS)})


def _events_by_ids() -> list[bytes]:
    events: list[bytes] = []
    for at in range(EVENTS):
        is_last = at == EVENTS - 1
        choice = {
            "text": "x",
            "token_ids": [END if is_last else at],
            "logprobs": {"content": [_entry(-0.5) | {"token_id": at}]},
            "finish_reason": "stop" if is_last else None,
            "stop_reason": None,
            "weight_versions": [{"version": "17", "start": at, "end": at + 1}],
        }
        events.append(b"data: " + orjson.dumps(_generated(choice)) + b"\n\n")
    counts = {"request_id": "chatcmpl-1", "model": "policy", "choices": [], "usage": _usage(EVENTS)}
    events[-1] += b"data: " + orjson.dumps(counts) + b"\n\ndata: [DONE]\n\n"
    return events


@lru_cache(maxsize=1_000)
def _rendered(body: bytes) -> bytes:
    """A conversation by bytes: what begins a message, its text, what ends it."""
    asked = orjson.loads(body)
    ids: list[int] = []
    for message in asked["messages"]:
        ids += [ROLES[message["role"]], *message["content"].encode(), END]
    if asked.get("add_generation_prompt", True):
        ids.append(ROLES["assistant"])
    rendered = {
        "request_id": "chatcmpl-1",
        "model": asked["model"],
        "token_ids": ids,
        "features": None,
        "reasoning_parser_kwargs": None,
        "sampling_params": {"max_tokens": asked.get("max_tokens", 64), "temperature": 1.0, "logprobs": 0},
        "stream": False,
    }
    pause = asked.get("metadata") or {}
    return _response(orjson.dumps(rendered | pause))


def _response(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _chunks(events: list[bytes]) -> list[bytes]:
    return [b"%x\r\n%b\r\n" % (len(event), event) for event in events]


ANSWER: Final = _response(_answer())
MODELS: Final = _response(orjson.dumps({"object": "list", "data": [{"id": "policy", "object": "model"}]}))
HEALTHY: Final = _response(b"{}")
NO_ROUTE: Final = _response(b'{"error":{"message":"no such route"}}', "404 Not Found")
BY_IDS: Final = _response(_by_ids())
WRITTEN: Final = _response(orjson.dumps({"prompt": "<|im_end|>"}))
CHUNKS: Final = _chunks(_events())
CHUNKS_BY_IDS: Final = _chunks(_events_by_ids())
STREAM_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END: Final = b"0\r\n\r\n"


class NullBackend(asyncio.Protocol):
    """One connection: one request after the other."""

    def __init__(self, by_ids: bool) -> None:
        self._by_ids = by_ids
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
        if path == b"/v1/chat/completions" and not self._by_ids:
            self._sample(request, ANSWER, CHUNKS)
        elif path == b"/inference/v1/generate" and self._by_ids:
            self._sample(request, BY_IDS, CHUNKS_BY_IDS)
        elif path == b"/v1/chat/completions/render" and self._by_ids:
            self._transport.write(_rendered(request.partition(b"\r\n\r\n")[2]))
        elif path == b"/detokenize" and self._by_ids:
            self._transport.write(WRITTEN)
        else:
            self._transport.write({b"/health": HEALTHY, b"/v1/models": MODELS}.get(path, NO_ROUTE))

    def _sample(self, request: bytes, answer: bytes, chunks: list[bytes]) -> None:
        pause = _PAUSE.search(request)
        seconds = float(pause[1]) / 1000 if pause else 0.0
        if _STREAM.search(request):
            self._after(seconds, lambda: self._send_event(chunks, 0, seconds))
        else:
            self._after(seconds, lambda: self._transport.write(answer))

    def _send_event(self, chunks: list[bytes], at: int, seconds: float) -> None:
        begin = STREAM_HEAD if at == 0 else b""
        if at == EVENTS - 1:
            self._transport.write(begin + chunks[at] + STREAM_END)
            return
        self._transport.write(begin + chunks[at])
        self._after(seconds, lambda: self._send_event(chunks, at + 1, seconds))

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        if seconds:
            self._timer = self._loop.call_later(seconds, then)
        else:
            then()


async def main(port: int, by_ids: bool) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(NullBackend, by_ids), "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--tokens", action="store_true", help="the routes of token ids, no chat route")
    options = parser.parse_args()
    uvloop.run(main(options.port, options.tokens))

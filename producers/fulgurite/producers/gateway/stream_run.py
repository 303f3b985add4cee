"""One streamed call while it runs: what of its answer has come, what waits for the end. See streaming.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import orjson

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.errors import BROKEN, ApiError
from fulgurite.producers.gateway.exchange import Exchange
from fulgurite.producers.gateway.http import EventStream
from fulgurite.producers.gateway.outcome import Served
from fulgurite.producers.gateway.protocols.base import INVALID, Stream, invalid, unreadable
from fulgurite.producers.gateway.protocols.choices import DONE
from fulgurite.producers.gateway.token_stream import Translation

MAX_HELD_BYTES: Final = 16 * 1024 * 1024
"""The end of an answer: a last event a choice, the count of tokens; the Responses API repeats the answer in it."""


@dataclass(slots=True)
class Run:
    """One streamed call while it runs."""

    call: Call
    out: EventStream
    served: Served | None = None
    stream: Stream | None = None
    translation: Translation | None = None
    """Where the backend's events are not those of the agent's protocol."""
    rejected: bytes | None = None
    """What is no answer, for the dead letter."""
    held: list[bytes] = field(default_factory=list[bytes])
    held_bytes: int = 0
    refused: bool = False
    """An event says that the request is at fault, not who was asked."""
    recorded: bool = False
    last_sent: bool = False

    def is_of_backend(self, exchange: Exchange, error: ApiError) -> bool:
        """Whether who was asked failed, after its 200: it broke off, or reports that it failed."""
        return exchange.status == 200 and not self.refused and (error.of_backend or error.code == BROKEN)

    def begin_anew(self) -> None:
        """Forgets a try of which the agent has had nothing, and of which nothing will be recorded."""
        self.served = self.stream = self.rejected = None
        self.held.clear()
        self.held_bytes = 0
        if self.translation:
            self.translation = Translation(self.call, self.translation.prepared)

    def fold(self, stream: Stream, events: list[sse.Event]) -> tuple[bytes, ApiError | None]:
        """(what passes on, what stops it there)."""
        passed: list[bytes] = []
        for event in events:
            try:
                now, later = stream.feed(self.translation(event) if self.translation else event)
                self.held_bytes += len(later)
                if self.held_bytes > MAX_HELD_BYTES:
                    raise invalid(f"has more than {MAX_HELD_BYTES} bytes after its end")
            except ApiError as error:
                if error.code == INVALID:
                    self.rejected = event.raw
                self.refused = error.of_backend and _is_refusal(event)
                return b"".join(passed), error
            except Exception as error:
                self.rejected = event.raw
                return b"".join(passed), unreadable(error)
            if now:
                passed.append(now)
            if later:
                self.held.append(later)
        if stream.speaks and self.served and self.served.first_chunk_seconds is None:
            self.served.first_chunk_seconds = self.call.seconds()
        return b"".join(passed), None

    def close(self, stream: Stream) -> ApiError | None:
        """No more events come. What is wrong with what came."""
        try:
            stream.close()
        except Exception as error:
            self.rejected = b"".join(self.held)
            return unreadable(error)
        return None


def _is_refusal(event: sse.Event) -> bool:
    """Whether an event with an error has the code of a status that is the asker's fault, as vLLM's have."""
    try:
        data = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return False
    error = data.get("error") if isinstance(data, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return isinstance(code, int) and 400 <= code <= 499


def is_whole(event: sse.Event) -> bool:
    """Whether what came without its blank line is all of an event."""
    if event.data == DONE:
        return True
    try:
        orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return False
    return True

"""Server-sent events, taken apart as they arrive. Pure: bytes in, events out.

Promises: an event comes out once, as soon as its blank line is there, however its bytes were cut; what is not
terminated yet is kept, for who asks at the end of the stream. A byte order mark at its beginning is passed over.
Knows nothing of what events mean; the reader of the body bounds how much there can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MEDIA_TYPE: Final = "text/event-stream"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(slots=True, frozen=True)
class Event:
    raw: bytes
    """As it came, with its blank line; line ends are \\n."""
    data: bytes
    """The lines after `data:`, joined by \\n. Empty for a comment."""


class Parser:
    """Of one stream. Each byte is looked at once, however long an event is."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._return = False
        self._head: bytes | None = b""
        """The stream's first bytes while they may be half of a byte order mark."""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are complete with this chunk."""
        if self._head is not None:
            chunk = self._head + chunk
            if len(chunk) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(chunk):
                self._head = chunk
                return []
            self._head = None
            chunk = chunk.removeprefix(_BYTE_ORDER_MARK)
        if self._return:
            chunk = b"\r" + chunk
        # A \r at the end may be half of a \r\n.
        self._return = chunk.endswith(b"\r")
        if self._return:
            chunk = chunk[:-1]
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        looked_at = max(0, len(self._rest) - 1)
        self._rest += chunk
        end = self._rest.rfind(b"\n\n", looked_at)
        if end < 0:
            return []
        complete = bytes(self._rest[:end])
        del self._rest[: end + 2]
        return [Event(block + b"\n\n", _data(block)) for block in complete.split(b"\n\n") if block]

    def end(self) -> list[Event]:
        """What came without its blank line before the stream ended: whole or half an event, or none."""
        block = bytes(self._rest).strip(b"\n")
        self._rest.clear()
        return [Event(block + b"\n\n", _data(block))] if block else []


def is_stream(content_type: str) -> bool:
    """Whether a content-type header names a stream of events, in whatever letters."""
    return content_type.partition(";")[0].strip().lower() == MEDIA_TYPE


def event(data: bytes, name: str = "") -> bytes:
    """An event as bytes; `data` is one line."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"


def _data(block: bytes) -> bytes:
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:]
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)

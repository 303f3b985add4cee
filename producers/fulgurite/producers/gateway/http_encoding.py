"""An answer that came compressed although it was asked for plain: some providers compress whatever they are asked for.

Promises: read as any other answer (http_connection.py), no more than HIGH_BYTES of plain bytes at a time, however much
they were compressed, and nothing more is taken of the connection meanwhile; what is cut off, or is no such encoding,
raises Broken. gzip and zlib, alone and in one part. Whether there is too much of it in all is the reader's question.
"""

from __future__ import annotations

import zlib
from typing import Final

from fulgurite.producers.gateway.http_connection import HIGH_BYTES, PLAIN, Broken, Response

_EITHER: Final = 32 + zlib.MAX_WBITS
"""zlib's word for gzip or zlib, whichever the first bytes are of."""


class Inflated:
    """As Response."""

    def __init__(self, response: Response) -> None:
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._zlib = zlib.decompressobj(_EITHER)
        self._rest = b""
        """Compressed, and not looked at."""
        self._full = self._begun = False

    @property
    def at_eof(self) -> bool:
        return self._response.at_eof and not self._rest and not self._full

    def read_now(self) -> bytes:
        given = self._rest or self._response.read_now()
        if given or self._full:
            self._begun = True
            if data := self._inflate(given):
                return data
        if self.at_eof and self._begun and not self._zlib.eof:
            raise Broken("ContentCutOff")
        return b""

    async def read(self) -> bytes:
        while not (data := self.read_now()) and not self.at_eof:
            self._rest = await self._response.read()
        return data

    def close(self) -> None:
        self._response.close()

    def _inflate(self, given: bytes) -> bytes:
        try:
            data = self._zlib.decompress(given, HIGH_BYTES)
        except zlib.error:
            raise Broken("ContentEncoding") from None
        if self._zlib.unused_data:  # a second part: left out, it would make of the first a whole answer
            raise Broken("ContentEncoding")
        self._rest, self._full = self._zlib.unconsumed_tail, len(data) == HIGH_BYTES
        return data


def plain(response: Response) -> Response | Inflated:
    """The answer as it was meant."""
    encoding = response.headers.get("content-encoding")
    return Inflated(response) if encoding and encoding.lower() != PLAIN else response

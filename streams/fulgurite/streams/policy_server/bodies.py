"""Bodies in, bodies out: what the routes share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response

from fulgurite.streams.policy_server import protocol
from fulgurite.streams.policy_server.protocol import BadRequest, Json

Handler = Callable[[Request], Awaitable[Response]]
Handlers = list[tuple[str, str, Handler]]
"""Method, path, handler."""


def as_json(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


async def json_body(request: Request) -> Json:
    """The body as JSON. Raises BadRequest, also when it is larger than MAX_BODY_BYTES."""
    return protocol.parse_json(await read_body(request))


async def read_body(request: Request) -> bytes:
    """Raises BadRequest when it is larger than MAX_BODY_BYTES, before all of it was read."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > protocol.MAX_BODY_BYTES:
            raise BadRequest(f"the body is larger than {protocol.MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)

"""The routes: OpenAI's chat completions, and the control routes of vLLM with the same bodies, so that gateway and
follower know one protocol (vLLM needs VLLM_SERVER_DEV_MODE=1 for them; here they are always there, so listen on
loopback only).

| route                         | answer                                                                          |
|-------------------------------|---------------------------------------------------------------------------------|
| GET  /health                  | 200; 503 until there are weights                                                |
| GET  /v1/models               | the one served model                                                            |
| POST /v1/chat/completions     | 503 with Retry-After without weights or with a full queue                       |
| POST /pause?mode=&clear_cache=| {"status": "paused"}; mode abort (vLLM's default), wait or keep; see worker.py  |
| POST /resume                  | {"status": "resumed"}                                                           |
| GET  /is_paused               | {"is_paused": …}                                                                |
| POST /collective_rpc          | reload_weights {"weights_path": folder}: {"results": [null]}                    |
| POST /update_weight_version   | {"new_version": "17"}: {"success": true, "new_version": "17"}                   |
| GET  /weight_info             | {"weight_version": "17"}; "default" when the weights were not named             |
| POST /weight_checker          | {"action": "checksum"}: {"checksums": {name: sha256}}; also "compare"           |
| GET  /metrics                 | Prometheus text                                                                 |

`clear_cache` is accepted and changes nothing: a swap always drops what the old weights computed, and there is no
prefix cache. Errors have OpenAI's shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import cast, get_args

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fulgurite.schemas.settings import PolicyServerSettings
from fulgurite.streams.policy_server import protocol
from fulgurite.streams.policy_server.policy import PolicyRefused
from fulgurite.streams.policy_server.protocol import BadRequest, Json, error_body
from fulgurite.streams.policy_server.worker import NotReady, PauseMode, QueueFull, Worker

_RETRY_AFTER_SECONDS = "1"
_CLIENT_CLOSED = 499
"""Nginx's number for a client that went away; nobody reads it."""

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def create_app(worker: Worker, settings: PolicyServerSettings, lifespan: Lifespan) -> Starlette:
    routes = Routes(worker, settings)
    handlers: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", routes.chat),
        ("GET", "/v1/models", routes.models),
        ("GET", "/health", routes.health),
        ("POST", "/pause", routes.pause),
        ("POST", "/resume", routes.resume),
        ("GET", "/is_paused", routes.is_paused),
        ("POST", "/collective_rpc", routes.collective_rpc),
        ("POST", "/update_weight_version", routes.update_weight_version),
        ("GET", "/weight_info", routes.weight_info),
        ("POST", "/weight_checker", routes.weight_checker),
        ("GET", "/metrics", routes.metrics),
    ]
    return Starlette(
        routes=[Route(path, _with_errors(handler), methods=[method]) for method, path, handler in handlers],
        lifespan=lifespan,
    )


def _json(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def _with_errors(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except BadRequest as error:
            return _json(error_body(400, str(error), error.param, error.code), 400)
        except PolicyRefused as error:
            return _json(error_body(400, str(error), "weights_path", "policy_refused"), 400)
        except (NotReady, QueueFull) as error:
            code = "not_ready" if isinstance(error, NotReady) else "queue_full"
            return _json(error_body(503, str(error), code=code), 503, {"Retry-After": _RETRY_AFTER_SECONDS})

    return handle


class Routes:
    def __init__(self, worker: Worker, settings: PolicyServerSettings) -> None:
        self._worker = worker
        self._settings = settings

    async def chat(self, request: Request) -> Response:
        body = await _body(request)
        policy = self._worker.policy
        if policy is None:
            raise NotReady("no weights are loaded yet")
        name = self._settings.served_model_name
        chat = protocol.parse_chat(body, policy, name, self._settings.max_new_tokens)
        answer = asyncio.ensure_future(self._worker.generate(chat.generation))
        # Nobody pays for the answer of a client that went away: it may be held over a long pause.
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=_CLIENT_CLOSED)
            answer.result()
        finally:
            gone.cancel()
            answer.cancel()
        return _json(protocol.chat_body(chat, policy, name))

    async def models(self, _: Request) -> Response:
        name = self._settings.served_model_name
        policy = self._worker.policy
        model = {"id": name, "object": "model", "created": 0, "owned_by": "fulgurite"}
        if policy is not None:
            model |= {"root": str(policy.folder), "max_model_len": policy.max_positions}
        return _json({"object": "list", "data": [model]})

    async def health(self, _: Request) -> Response:
        if self._worker.policy is None:
            raise NotReady("no weights are loaded yet")
        return Response()

    async def pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise BadRequest(f"mode must be one of {', '.join(get_args(PauseMode))}, not {mode!r}", "mode")
        await self._worker.pause(cast(PauseMode, mode))
        return _json({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        self._worker.resume()
        return _json({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        return _json({"is_paused": self._worker.paused})

    async def collective_rpc(self, request: Request) -> Response:
        body = await _body(request)
        if body.get("method") != "reload_weights":
            raise BadRequest(f"method must be reload_weights, not {body.get('method')!r}", "method")
        kwargs = body.get("kwargs")
        path = cast(Json, kwargs).get("weights_path") if isinstance(kwargs, dict) else None
        if not isinstance(path, str) or not path:
            raise BadRequest("kwargs must hold weights_path, the folder to load", "kwargs.weights_path")
        await self._worker.reload(Path(path))
        return _json({"results": [None]})

    async def update_weight_version(self, request: Request) -> Response:
        version = (await _body(request)).get("new_version")
        if not isinstance(version, str) or not version or len(version) > 128:
            raise BadRequest("new_version must be a text of 1 to 128 characters", "body.new_version")
        await self._worker.set_version(version)
        return _json({"success": True, "new_version": version})

    async def weight_info(self, _: Request) -> Response:
        return _json({"weight_version": self._worker.version})

    async def weight_checker(self, request: Request) -> Response:
        body = await _body(request)
        policy = self._worker.policy
        if policy is None:
            raise NotReady("no weights are loaded yet")
        checksums = await asyncio.to_thread(policy.checksums)
        baseline = body.get("baseline")
        if body.get("action") == "checksum":
            return _json({"checksums": checksums})
        if body.get("action") == "compare" and isinstance(baseline, dict):
            expected = cast(Json, baseline)
            names = checksums.keys() | expected.keys()
            mismatches = sorted(name for name in names if checksums.get(name) != expected.get(name))
            return _json({"match": not mismatches, "mismatches": mismatches})
        raise BadRequest("action must be checksum, or compare with a baseline of checksums", "action")

    async def metrics(self, _: Request) -> Response:
        worker = self._worker
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running {worker.running}",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting {worker.waiting}",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total {worker.tokens_sampled}",
            "# TYPE vllm:request_success_total counter",
            f"vllm:request_success_total {worker.requests_finished}",
        ]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _body(request: Request) -> Json:
    """The body as JSON. Raises BadRequest, also when it is larger than MAX_BODY_BYTES, before all of it was read."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > protocol.MAX_BODY_BYTES:
            raise BadRequest(f"the body is larger than {protocol.MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
    return protocol.parse_json(b"".join(chunks))


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone. The body was read, so that is the only message that can still come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

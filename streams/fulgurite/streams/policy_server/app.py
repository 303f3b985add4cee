"""The routes, those of vLLM with the same bodies, so that gateway and follower know one protocol.

Generating, and what belongs to it (generation_routes.py). Each of the first three takes stream, n, stop and
stream_options.include_usage, and answers 503 with Retry-After without weights or with a full queue:

| route                            | answer                                                                       |
|----------------------------------|------------------------------------------------------------------------------|
| POST /v1/chat/completions        | with return_token_ids also token ids, with return_weight_versions the spans  |
| POST /v1/completions             | as above; a prompt is a text or token ids, or a list of them                 |
| POST /inference/v1/generate      | token ids to token ids, with the spans; output_mode text adds texts          |
| POST /v1/chat/completions/render | the body that generate would take: the messages' token ids and its sampling  |
| POST /tokenize, /detokenize      | a prompt or messages to tokens; tokens to prompt                             |

Controlling (control_routes.py). vLLM needs VLLM_SERVER_DEV_MODE=1 for most of them; here they are always there, so
listen on loopback only:

| route                         | answer                                                                          |
|-------------------------------|---------------------------------------------------------------------------------|
| GET  /health                  | 200; 503 until there are weights                                                |
| GET  /v1/models               | the one served model                                                            |
| POST /pause?mode=&clear_cache=| {"status": "paused"}; mode abort (vLLM's default), wait or keep; see worker.py  |
| POST /resume                  | {"status": "resumed"}                                                           |
| GET  /is_paused               | {"is_paused": …}                                                                |
| POST /collective_rpc          | reload_weights {"weights_path": folder}: {"results": [null]}                    |
| POST /update_weight_version   | {"new_version": "17"}: {"success": true, "new_version": "17"}                   |
| GET  /weight_info             | {"weight_version": "17"}; "default" when the weights were not named             |
| POST /weight_checker          | {"action": "checksum"}: {"checksums": {name: sha256}}; also "compare"           |
| GET  /metrics                 | Prometheus text                                                                 |
| GET  /openapi.json            | {"paths": …}: which routes there are, for who asks before use                   |

`clear_cache` is accepted and changes nothing: a swap always drops what the old weights computed, and there is no
prefix cache. Errors have OpenAI's shape. A stream has vLLM's: see chat.py, completions.py, generate.py; weight versions
are in the last chunk of each choice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fulgurite.schemas.settings import PolicyServerSettings
from fulgurite.streams.policy_server.bodies import Handler, as_json
from fulgurite.streams.policy_server.control_routes import ControlRoutes
from fulgurite.streams.policy_server.generation_routes import GenerationRoutes
from fulgurite.streams.policy_server.policy import PolicyRefused
from fulgurite.streams.policy_server.protocol import BadRequest, error_body
from fulgurite.streams.policy_server.worker import NotReady, QueueFull, Worker

_RETRY_AFTER_SECONDS = "1"

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def create_app(worker: Worker, settings: PolicyServerSettings, lifespan: Lifespan) -> Starlette:
    handlers = [*GenerationRoutes(worker, settings).handlers(), *ControlRoutes(worker, settings).handlers()]
    paths: dict[str, dict[str, object]] = {path: {method.lower(): {}} for method, path, _ in handlers}

    async def openapi(_: Request) -> Response:
        return as_json({"openapi": "3.1.0", "info": {"title": "fulgurite policy server"}, "paths": paths})

    return Starlette(
        routes=[
            Route(path, _with_errors(handler), methods=[method])
            for method, path, handler in [*handlers, ("GET", "/openapi.json", openapi)]
        ],
        lifespan=lifespan,
    )


def _with_errors(handler: Handler) -> Handler:
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except BadRequest as error:
            return as_json(error_body(400, str(error), error.param, error.code), 400)
        except PolicyRefused as error:
            return as_json(error_body(400, str(error), "weights_path", "policy_refused"), 400)
        except (NotReady, QueueFull) as error:
            code = "not_ready" if isinstance(error, NotReady) else "queue_full"
            return as_json(error_body(503, str(error), code=code), 503, {"Retry-After": _RETRY_AFTER_SECONDS})

    return handle

"""The routes that control the server and tell of it: pauses, weights and their version. See app.py for the table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast, get_args

from starlette.requests import Request
from starlette.responses import Response

from fulgurite.schemas.settings import PolicyServerSettings
from fulgurite.streams.policy_server.bodies import Handlers, as_json, json_body
from fulgurite.streams.policy_server.protocol import BadRequest, Json
from fulgurite.streams.policy_server.worker import NotReady, PauseMode, Worker


class ControlRoutes:
    def __init__(self, worker: Worker, settings: PolicyServerSettings) -> None:
        self._worker = worker
        self._settings = settings

    def handlers(self) -> Handlers:
        return [
            ("GET", "/v1/models", self.models),
            ("GET", "/health", self.health),
            ("POST", "/pause", self.pause),
            ("POST", "/resume", self.resume),
            ("GET", "/is_paused", self.is_paused),
            ("POST", "/collective_rpc", self.collective_rpc),
            ("POST", "/update_weight_version", self.update_weight_version),
            ("GET", "/weight_info", self.weight_info),
            ("POST", "/weight_checker", self.weight_checker),
            ("GET", "/metrics", self.metrics),
        ]

    async def models(self, _: Request) -> Response:
        name = self._settings.served_model_name
        policy = self._worker.policy
        model = {"id": name, "object": "model", "created": 0, "owned_by": "fulgurite"}
        if policy is not None:
            model |= {"root": str(policy.folder), "max_model_len": policy.max_positions}
        return as_json({"object": "list", "data": [model]})

    async def health(self, _: Request) -> Response:
        if self._worker.policy is None:
            raise NotReady("no weights are loaded yet")
        return Response()

    async def pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise BadRequest(f"mode must be one of {', '.join(get_args(PauseMode))}, not {mode!r}", "mode")
        await self._worker.pause(cast(PauseMode, mode))
        return as_json({"status": "paused"})

    async def resume(self, _: Request) -> Response:
        self._worker.resume()
        return as_json({"status": "resumed"})

    async def is_paused(self, _: Request) -> Response:
        return as_json({"is_paused": self._worker.paused})

    async def collective_rpc(self, request: Request) -> Response:
        body = await json_body(request)
        if body.get("method") != "reload_weights":
            raise BadRequest(f"method must be reload_weights, not {body.get('method')!r}", "method")
        kwargs = body.get("kwargs")
        path = cast(Json, kwargs).get("weights_path") if isinstance(kwargs, dict) else None
        if not isinstance(path, str) or not path:
            raise BadRequest("kwargs must hold weights_path, the folder to load", "kwargs.weights_path")
        await self._worker.reload(Path(path))
        return as_json({"results": [None]})

    async def update_weight_version(self, request: Request) -> Response:
        version = (await json_body(request)).get("new_version")
        if not isinstance(version, str) or not version or len(version) > 128:
            raise BadRequest("new_version must be a text of 1 to 128 characters", "body.new_version")
        await self._worker.set_version(version)
        return as_json({"success": True, "new_version": version})

    async def weight_info(self, _: Request) -> Response:
        return as_json({"weight_version": self._worker.version})

    async def weight_checker(self, request: Request) -> Response:
        body = await json_body(request)
        policy = self._worker.policy
        if policy is None:
            raise NotReady("no weights are loaded yet")
        checksums = await asyncio.to_thread(policy.checksums)
        baseline = body.get("baseline")
        if body.get("action") == "checksum":
            return as_json({"checksums": checksums})
        if body.get("action") == "compare" and isinstance(baseline, dict):
            expected = cast(Json, baseline)
            names = checksums.keys() | expected.keys()
            mismatches = sorted(name for name in names if checksums.get(name) != expected.get(name))
            return as_json({"match": not mismatches, "mismatches": mismatches})
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

"""One backend over HTTP: asked once, checked, listed. Whether it should be asked is not its business (places.py), nor
is the body of its answer (http_exchange.py).

It may be another server than a moment ago, with the weights that it started with: whenever a connection broke, or none
came about, the next request waits until it has said which version it has. Otherwise no request asks for that.

Redirects are not followed: another server is not the one the settings name. Cookies are not kept: they would mix
agents. Bodies and keys are never logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import orjson

from fulgurite.producers.gateway.away import AWAY_STATUSES, Away, had_it, most_tries
from fulgurite.producers.gateway.exchange import Ask, BackendKind
from fulgurite.producers.gateway.http_client import HttpClient, NotConnected
from fulgurite.producers.gateway.http_connection import Broken
from fulgurite.producers.gateway.http_exchange import HttpExchange
from fulgurite.producers.gateway.keys import parse_bearer
from fulgurite.producers.gateway.labels import Labels, NoSuchRoute, Seen
from fulgurite.producers.gateway.passing import headers_for
from fulgurite.producers.gateway.places import Capacity, Seat
from fulgurite.producers.gateway.protocols.base import loads, to_bytes
from fulgurite.producers.gateway.routing import LOST_ADAPTERS, UNVERSIONED
from fulgurite.schemas.resources import adapter_name, adapter_version
from fulgurite.schemas.settings import BackendSettings

logger = logging.getLogger(__name__)

CHECK_SECONDS: Final = 5.0
"""Longest that a question about health, models or version may take."""
BLAME_SECONDS: Final = 2.0
"""The same, where a request waits for it."""
MAX_CHECK_BYTES: Final = 4 * 1024 * 1024
MAX_LISTED: Final = 10_000
"""Models of one backend."""
HEALTH_FAILURES: Final = 2
"""In a row, until a backend counts as not well: a busy one may miss one."""
NOT_FOUND: Final = 404
REFUSED: Final = frozenset({401, 403})
NO_ROUTE: Final = frozenset({404, 405, 501})


class Replica:
    """One backend."""

    def __init__(
        self,
        settings: BackendSettings,
        capacity: Capacity,
        max_answer_bytes: int,
        answer_seconds: float,
        versions_changed: Callable[[], None],
    ) -> None:
        """`versions_changed` is told when `numbered` or `unnumbered` may have."""
        self.settings = settings
        self.capacity = capacity
        self.listed: dict[str, dict[str, Any]] = {}
        """What it serves by its own account, as it describes them; empty until it said so."""
        self._has_listed = False
        self._refuses_us = False
        """To list its models without an agent's key."""
        self._asked_as_agent_at = float("-inf")
        self._newest_adapter: int | None = None
        self.max_answer_bytes = max_answer_bytes
        self.answer_seconds = answer_seconds
        self._named = frozenset(settings.models)
        self._client = HttpClient(settings.url, self.doubt)
        self._skipped = "" if settings.routes_begin_with_v1 else "/v1"
        """Of routes: the URL's path is in its place."""
        self._labels = Labels(self._read_label, versions_changed)
        self._doubts = self._settled = 0
        """How often it may have become another server, and how many of these it has been asked after."""
        self._gives_versions: dict[str, bool] = {}
        self._failed_checks = 0
        self._key = settings.api_key.get_secret_value()
        self.read_key()

    @property
    def kind(self) -> BackendKind:
        return self.settings.kind

    @property
    def url(self) -> str:
        return self.settings.url

    @property
    def names(self) -> set[str]:
        """Models it is known to serve."""
        return {*self._named, *self.listed}

    @property
    def well(self) -> bool:
        return self.capacity.well

    @property
    def looks_well(self) -> bool:
        """Whether health checks say so, which know more than a request that takes long. A provider has none."""
        return self.kind == "vllm" and self.capacity.well

    def newest_adapter(self, resource: str) -> int | None:
        return self._newest_adapter if self.kind == "vllm" and resource == self.settings.resource else None

    @property
    def numbered(self) -> bool:
        """Whether its weights have a version, or had one."""
        return self._labels.numbered

    @property
    def unnumbered(self) -> bool:
        """Whether they have none, by its own account. With adapters they are not what is asked for."""
        return self._labels.unnumbered and self._newest_adapter is None

    def serves(self, model: str) -> bool:
        return model in self._named or model in self.listed

    @property
    def takes_any(self) -> bool:
        return not self.settings.models

    def may_list(self, model: str) -> bool:
        return self.kind == "vllm" and not self._has_listed and (self.takes_any or self.owns(model))

    def wants_key(self, since: float) -> bool:
        """Whether only an agent's key makes it list its models, and none was tried `since` then, or all in vain."""
        if not self._refuses_us or not self.settings.forward_authorization or not self.capacity.well:
            return False
        return not self._has_listed or self._asked_as_agent_at < since

    def owns(self, model: str) -> bool:
        resource = self.settings.resource
        return self.kind == "vllm" and (model == resource or adapter_version(resource, model) is not None)

    def close(self) -> None:
        self._labels.close()
        self._client.close()

    def read_key(self) -> None:
        """From its file, which may have changed; one that cannot be read just now leaves the key as it was."""
        if self.settings.api_key_file is not None:
            try:
                key = self.settings.api_key_file.read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                logger.warning("the API key of backend %s cannot be read: %s", self.url, type(error).__name__)
            else:
                self._key = key if key.isprintable() else ""

    async def ask(self, ask: Ask, seat: Seat, tries: int, silence_seconds: float) -> HttpExchange:
        """Its answer, whatever the status, once that is known. Raises Away."""
        route = ask.route.partition("?")[0]
        model = self._model(ask)
        adapter = adapter_version(self.settings.resource, model) if self.kind == "vllm" else None
        asks_version = self.kind == "vllm" and route not in UNVERSIONED and not self._gives_versions.get(route, False)
        if self._doubts != self._settled and self.kind == "vllm":
            await self._settle()
        before = await self._labels.before() if asks_version and adapter is None else None
        if self.capacity.behind and not ask.past_bounds:
            raise Away("its weights have no version now")
        body = ask.body_for(self.kind)
        if model != ask.model:
            body = to_bytes(loads(body) | {"model": model})
        try:
            response = await self._client.post(
                self._route(ask),
                body,
                self._authorization(ask.authorization),
                headers_for(self.kind, ask.headers) if ask.headers else "",
            )
        except NotConnected as error:
            self.doubt()
            raise Away(str(error)) from None
        except Broken as error:
            self.doubt()
            raise Away(str(error), most_tries=most_tries(self.kind)) from None
        exchange = HttpExchange(self, seat, response, route, tries, before, adapter, silence_seconds)
        if had_it(self.kind, response.status):
            raise Away(f"status {response.status}", most_tries=most_tries(self.kind), said=exchange)
        if response.status in AWAY_STATUSES:
            response.close()
            raise Away(f"status {response.status}")
        if response.status == NOT_FOUND and ask.newest_adapter:
            await self.list_models(ask.authorization)  # it was started anew, perhaps, and gets its adapters back
            if model not in self.listed:
                response.close()
                raise Away(f"it lost {model}")
        return exchange

    def _route(self, ask: Ask) -> str:
        route = ask.route.removeprefix(self._skipped)
        return f"{route}?{ask.query}" if ask.query and self.kind == "openai" else route

    def _model(self, ask: Ask) -> str:
        """The name it is asked for. Raises Away where that is an adapter, and it has none any more."""
        if not ask.newest_adapter:
            return ask.model
        if self._newest_adapter in (None, LOST_ADAPTERS):
            raise Away(f"it has no adapter of {ask.model} now")
        return adapter_name(self.settings.resource, self._newest_adapter)

    def doubt(self) -> None:
        """It may have ended: who answers next may be another one."""
        self._doubts += 1

    async def look_at_version(self) -> None:
        """Asks which version its weights have, unless it is an adapter that is asked for, or that was just asked."""
        if self.kind == "vllm" and self._newest_adapter is None:
            await self._labels.before()

    async def _settle(self) -> None:
        """One question for all that wait."""
        doubts = self._doubts
        if self._newest_adapter is None:
            await self._labels.now()
        self._settled = max(self._settled, doubts)

    async def label(self, before: Seen | None) -> str | None:
        """The version its weights have at some time after now; None where they had another one since `before`."""
        return await self._labels.after(before)

    def learned(self, route: str, *, gives_versions: bool) -> None:
        """Whether an answer of this route said which version sampled it. While all do, nobody asks before a call."""
        self._gives_versions[route] = gives_versions and self._gives_versions.get(route, True)

    async def check(self) -> str:
        """Empty when it is well, else what is wrong. Counts for `capacity.well`."""
        problem = await self.problem()
        if not problem:
            self._failed_checks = 0
            if not self.capacity.well and self._newest_adapter is None:
                await self._labels.now()  # before anybody asks it: it was started anew, perhaps
            if not self.capacity.well:
                logger.info("backend %s is well again", self.url)
                self.capacity.well = True
                self.capacity.breaker.succeeded()
                self._gives_versions.clear()  # it may be another server now
        else:
            self._failed_checks += 1
            self.doubt()
            if self._failed_checks >= HEALTH_FAILURES and self.capacity.well:
                logger.warning("backend %s is not well (%s); requests wait or go elsewhere", self.url, problem)
                self.capacity.well = False
        return problem

    async def problem(self) -> str:
        """Empty when /health says that it is well, or when there is no such route."""
        try:
            status, _ = await self._get("/health")
        except TimeoutError:
            return "TimeoutError"
        except (NotConnected, Broken) as error:
            return str(error)
        return "" if status == 200 or status in NO_ROUTE else f"status {status}"

    async def says_well(self) -> bool:
        """Whether it says so now, after a failure that it reported; a provider has no way to."""
        if self.kind != "vllm":
            return True
        try:
            async with asyncio.timeout(BLAME_SECONDS):
                return not await self.problem()
        except TimeoutError:
            return False

    async def list_models(self, authorization: str = "") -> bool:
        """Asks which models it serves; what it said before stands where it does not answer. Whether it did."""
        if authorization:
            self._asked_as_agent_at = asyncio.get_running_loop().time()
        try:
            status, data = await self._get("/v1/models", authorization)
            answer = orjson.loads(data) if status == 200 else None
        except (TimeoutError, NotConnected, Broken, ValueError):
            return False
        if not authorization:
            self._may_be_refused(status)
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            return False
        named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        self.listed = {entry["id"]: entry for entry in named[:MAX_LISTED]}
        self._has_listed = True
        versions = (adapter_version(self.settings.resource, name) for name in self.listed)
        lost = None if self._newest_adapter is None else LOST_ADAPTERS
        self._newest_adapter = max((version for version in versions if version is not None), default=lost)
        return True

    def _may_be_refused(self, status: int) -> None:
        """Of a question without an agent's key."""
        refused = status in REFUSED
        if refused and not self._refuses_us:
            otherwise = (
                "it is asked with the keys that agents send"
                if self.settings.forward_authorization
                else "what it serves is not known: set api_key or api_key_file of this backend"
            )
            logger.warning(
                "backend %s does not say which models it serves (status %d): %s", self.url, status, otherwise
            )
        self._refuses_us = refused

    async def _read_label(self) -> str | None:
        try:
            status, data = await self._get("/weight_info")
            info = orjson.loads(data) if status == 200 else None
        except (NotConnected, Broken):
            self.doubt()
            return None
        except (TimeoutError, ValueError):
            return None
        if status in NO_ROUTE:
            raise NoSuchRoute
        label = info.get("weight_version") if isinstance(info, dict) else None
        return str(label) if label is not None else None

    async def _get(self, path: str, authorization: str = "") -> tuple[int, bytes]:
        """A short question. Raises TimeoutError, NotConnected and Broken; a long answer is broken."""
        async with asyncio.timeout(CHECK_SECONDS):
            response = await self._client.get(path, self._authorization(authorization))
            data = bytearray()
            try:
                while part := await response.read():
                    data += part
                    if len(data) > MAX_CHECK_BYTES:
                        raise Broken("AnswerTooLarge")
            finally:
                response.close()
            return response.status, bytes(data)

    def _authorization(self, of_agent: str) -> str:
        """The header; empty for none."""
        if self._key:
            return f"Bearer {self._key}"
        if not self.settings.forward_authorization or not of_agent or not of_agent.isprintable():
            return ""
        bearer = parse_bearer(of_agent)
        if bearer.rollout_id or bearer.attempt_id:
            return f"Bearer {bearer.key}" if bearer.key else ""
        return of_agent

"""The backends of a pool: who serves which model, which of them is well. Asked every gateway.health_seconds, and more
often one that is not well, or lacks an adapter or a version that another has.

A model that nobody is known to serve makes us ask all servers what they serve, at most once a RELIST_SECONDS: an
adapter may have been loaded just now. No provider is asked for it before every vllm that lists its models has done so
once: it may be one that is away. Knows nothing of requests (pool.py) but what they ask for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from fulgurite.producers.gateway.breaker import Breaker
from fulgurite.producers.gateway.errors import ApiError
from fulgurite.producers.gateway.exchange import Ask
from fulgurite.producers.gateway.metrics import BackendMetrics, Metrics
from fulgurite.producers.gateway.places import Capacity, choose, score
from fulgurite.producers.gateway.replica import CHECK_SECONDS, Replica
from fulgurite.producers.gateway.routing import (
    LOST_ADAPTERS,
    named,
    others,
    unheard,
    with_newest_adapter,
    without_version,
)
from fulgurite.schemas.settings import BackendSettings, GatewaySettings

logger = logging.getLogger(__name__)

RECOVERY_SECONDS: Final = 0.25
"""How often a backend that is not well, or behind, is asked, at least: requests wait for it."""
RELIST_SECONDS: Final = 1.0


class Member(Replica):
    """A backend in the pool, with its metrics."""

    def __init__(
        self,
        settings: BackendSettings,
        gateway: GatewaySettings,
        metrics: Metrics,
        versions_changed: Callable[[], None],
    ) -> None:
        breaker = Breaker(gateway.breaker_failures, gateway.breaker_seconds, gateway.max_breaker_seconds)
        capacity = Capacity(settings.url, breaker, settings.max_concurrent_requests, settings.max_queued_requests)
        super().__init__(settings, capacity, gateway.max_answer_bytes, gateway.answer_seconds, versions_changed)
        self.metrics: BackendMetrics = metrics.backend(settings.url)
        self.metrics.in_flight.set_function(lambda: capacity.in_flight)


class Members:
    """All backends of the settings. Its tasks are the group's; `close` ends them."""

    def __init__(
        self,
        settings: GatewaySettings,
        metrics: Metrics,
        tasks: asyncio.TaskGroup,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is told when one became well, or is no longer, and the same of who has a version."""
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._tasks = tasks
        self._changed = changed
        self.all = [Member(backend, settings, metrics, self._compare) for backend in settings.all_backends()]
        self._by_capacity = {member.capacity: member for member in self.all}
        self._unasked = {member for member in self.all if member.kind == "vllm"}
        """Not looked at yet."""
        self._asked_all = asyncio.Event()
        self._newer = asyncio.Event()
        """Somebody has a newer adapter than any had, or lacks a version."""
        self._looking = [tasks.create_task(self._look_after(member)) for member in self.all]
        self._relisted_at = float("-inf")
        self._relisting: asyncio.Task[None] | None = None

    def __getitem__(self, capacity: Capacity) -> Member:
        return self._by_capacity[capacity]

    def close(self) -> None:
        for task in (*self._looking, self._relisting):
            if task:
                task.cancel()
        for member in self.all:
            member.close()

    async def serving(self, ask: Ask) -> tuple[Ask, list[Member]]:
        """What is asked, and who may be. Raises ApiError: 404, and 503 where that could not be found out."""
        await self._list_as(ask.authorization)
        asked, found = self._known(ask)
        if not found:
            await self._relist(ask.deadline)
            asked, found = self._known(ask)
            while not found and (silent := unheard(self.all, ask.model)):
                await self._hear(ask, silent)
                asked, found = self._known(ask)
        if found := found or others(self.all, ask.model):
            return asked, found
        raise ApiError(404, "model_not_found", f"no backend serves the model {ask.model[:200]!r}", param="model")

    async def follows_policy(self, model: str, deadline: float, authorization: str) -> bool:
        """See `Backends`: the first call after a start is answered like those after it."""
        if not self._asked_all.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._asked_all.wait()
        await self._list_as(authorization)
        found = self._serving(model)
        return bool(found) and all(member.kind == "vllm" for member in found)

    def endpoints(self, model: str) -> frozenset[str]:
        """See `Backends`."""
        now = self._loop.time()
        return frozenset(member.url for member in self._serving(model) if member.capacity.answers(now))

    def preferred(self, model: str, pin: str) -> str:
        """See `Backends`."""
        capacities = [member.capacity for member in self._serving(model)]
        found = choose(capacities, pin, self._loop.time())
        if found is None and capacities:  # a place is waited for
            found = max(capacities, key=lambda capacity: score(pin, capacity.url))
        return found.url if found else ""

    def _serving(self, model: str) -> list[Member]:
        return with_newest_adapter(self.all, model) or named(self.all, model)

    async def models(self, authorization: str = "") -> list[dict[str, Any]]:
        """What all backends serve, as /v1/models describes it. Raises ApiError(503) when none of them could say."""
        await self._relist(self._loop.time() + CHECK_SECONDS)
        # Some say so only to who has a key of theirs.
        silent = [member for member in self.all if member.kind == "vllm" and not member.listed]
        forwarded = [member for member in silent if member.settings.forward_authorization]
        await asyncio.gather(*(self._list(member, authorization) for member in forwarded))
        found: dict[str, dict[str, Any]] = {}
        for member in self.all:
            found |= {name: entry for name, entry in member.listed.items() if name not in found}
            resource = member.settings.resource
            for name in (*member.settings.models, *([resource] if member.newest_adapter(resource) is not None else ())):
                found.setdefault(name, {"id": name, "object": "model", "created": 0, "owned_by": member.kind})
        if not found and silent:
            raise ApiError(503, "backend_unavailable", "no backend says which models it serves")
        return list(found.values())

    async def health(self, timeout_seconds: float) -> str:
        """Empty when at least one backend is well, else what is wrong. Asked now, those that can be asked."""
        problems = await asyncio.gather(*(self._problem(member, timeout_seconds) for member in self.all))
        return "" if "" in problems else "; ".join(dict.fromkeys(problems))

    def state(self) -> list[dict[str, Any]]:
        """Of each backend, for a report to whoever runs the gateway; agents should not see it."""
        now = self._loop.time()
        return [
            {
                "url": member.url,
                "kind": member.kind,
                "well": member.capacity.well,
                "breaker": member.capacity.breaker.state(now),
                "in_flight": member.capacity.in_flight,
                "models": sorted(member.names),
            }
            for member in self.all
        ]

    async def _list_as(self, authorization: str) -> None:
        """Asks those that tell us nothing without an agent's key, with this one: as often as the others are asked."""
        now = self._loop.time()
        mine = [member for member in self.all if member.wants_key(now - self._settings.health_seconds)]
        if mine and authorization:
            await asyncio.gather(*(self._list(member, authorization) for member in mine))

    async def _hear(self, ask: Ask, silent: list[Member]) -> None:
        """Waits a while for servers that have not said yet what they serve. Raises ApiError(503) at the deadline."""
        forwarded = [member for member in silent if member.settings.forward_authorization]
        await asyncio.gather(*(self._list(member, ask.authorization) for member in forwarded))
        left = ask.deadline - self._loop.time()
        if left <= 0:
            urls = ", ".join(member.url for member in silent)
            logger.warning("a call waited in vain for %s to list its models (or name them in its settings)", urls)
            message = f"no backend is known to serve {ask.model[:200]!r}, and not all have said what they serve"
            raise ApiError(503, "backend_unavailable", message)
        if all(member.may_list(ask.model) for member in silent):
            await asyncio.sleep(min(left, RECOVERY_SECONDS))
            await self._relist(ask.deadline)

    def _known(self, ask: Ask) -> tuple[Ask, list[Member]]:
        if found := with_newest_adapter(self.all, ask.model):
            return replace(ask, newest_adapter=True), found
        return ask, named(self.all, ask.model)

    async def _relist(self, deadline: float) -> None:
        """Asks all servers what they serve; everybody waits for the same answer."""
        if self._relisting is None:
            if self._loop.time() - self._relisted_at < RELIST_SECONDS:
                return
            self._relisting = self._tasks.create_task(self._list_all())
        await asyncio.wait({self._relisting}, timeout=deadline - self._loop.time())

    async def _list_all(self) -> None:
        try:
            well = [member for member in self.all if member.kind == "vllm" and member.capacity.well]
            await asyncio.gather(*(self._list(member) for member in well))
        finally:
            self._relisted_at = self._loop.time()
            self._relisting = None

    async def _look_after(self, member: Member) -> None:
        """Its health, models and key, for as long as the pool lives."""
        usual = self._settings.health_seconds
        while True:
            member.read_key()
            if member.kind == "vllm":
                was_well = member.capacity.well
                problem = await member.check()
                if not problem:
                    await self._list(member)
                    await member.look_at_version()
                if was_well != member.capacity.well:
                    self._changed()
            self._unasked.discard(member)
            if not self._unasked:
                self._asked_all.set()
            member.metrics.stands(well=member.capacity.well, breaker=member.capacity.breaker.state(self._loop.time()))
            seconds = usual if member.capacity.well else min(usual, RECOVERY_SECONDS)
            seconds *= random.uniform(0.9, 1.1)
            if self._is_behind(member):
                await asyncio.sleep(min(seconds, RECOVERY_SECONDS))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        while not self._is_behind(member):
                            await self._newer.wait()

    async def _list(self, member: Member, authorization: str = "") -> None:
        """The others are looked at again where it has a newer adapter than any: until then it gets all calls."""
        resource = member.settings.resource
        before = self._newest_adapter(resource)
        await member.list_models(authorization)
        self._compare()
        if self._newest_adapter(resource) > before:
            self._wake()

    def _wake(self) -> None:
        """Those that are behind are looked at now."""
        newer, self._newer = self._newer, asyncio.Event()
        newer.set()

    def _compare(self) -> None:
        """Who has no version where others have: not asked until it has one."""
        found = without_version(self.all)
        changed = [member for member in self.all if member.capacity.behind != (member in found)]
        for member in changed:
            member.capacity.behind = member in found
            if member.capacity.behind:
                logger.warning("backend %s has weights without a version; requests wait or go elsewhere", member.url)
            else:
                logger.info("backend %s has a version again", member.url)
        if changed:
            self._wake()
            self._changed()

    def _newest_adapter(self, resource: str) -> int:
        found = (member.newest_adapter(resource) for member in self.all)
        return max((version for version in found if version is not None), default=LOST_ADAPTERS)

    def _is_behind(self, member: Member) -> bool:
        resource = member.settings.resource
        mine = member.newest_adapter(resource)
        newest = self._newest_adapter(resource)
        return member.capacity.behind or (member.kind == "vllm" and newest > (LOST_ADAPTERS if mine is None else mine))

    async def _problem(self, member: Member, timeout_seconds: float) -> str:
        if member.kind != "vllm":
            return "" if member.capacity.answers(self._loop.time()) else "left alone after failures"
        try:
            async with asyncio.timeout(timeout_seconds):
                return await member.problem()
        except TimeoutError:
            return "TimeoutError"

"""Agent functions: found by name, checked before any work is asked for, called alike whether coroutine or plain.

    async def agent(task, rollout) -> float | None      runs in the event loop; must not block it
    def agent(task, rollout) -> float | None            runs in a thread of its own

A number returned is the rollout's reward; None says that the agent gave its rewards itself. Does not know attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, SupportsFloat, cast

from fulgurite.producers.named_objects import load_object
from fulgurite.producers.rollout import RolloutContext
from fulgurite.schemas.errors import SettingsError

CANCEL_SECONDS = 2.0
"""How long a cancelled agent may clean up before it counts as hung."""

AgentFunction = Callable[[Any, RolloutContext], Any]


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent function, ready to be called."""

    name: str
    function: AgentFunction
    is_async: bool

    async def run(self, task: Any, rollout: RolloutContext, calls: AgentCalls) -> Any:
        """What the function returns. Cancelling ends a coroutine; a thread goes on by itself, and `calls` counts it."""
        if not self.is_async:
            return await calls.run_in_thread(lambda: self.function(task, rollout))
        try:
            return await cast(Awaitable[Any], self.function(task, rollout))
        except SystemExit as error:  # would end the event loop: the agent has failed, the runner goes on
            raise AgentExit(error.code) from error


def load_agent(spec: str) -> Agent:
    """The agent that `module:function` names. Raises SettingsError: what is wrong and what is expected."""
    where = "runner.agent"
    found = load_object(spec, where, "examples.calculator.agent:solve")
    return as_agent(found, spec.partition(":")[2], f"{where} = {spec!r}")


def as_agent(function: Any, name: str, where: str = "agent") -> Agent:
    """Checks that the function can be called with a task and a rollout. Raises SettingsError if not."""
    expected = "expected `async def agent(task, rollout)` or `def agent(task, rollout)`"
    if not callable(function):
        raise SettingsError(f"{where}: {name} is a {type(function).__name__}, not a function; {expected}")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise SettingsError(f"{where}: {name} cannot be called with (task, rollout): {error}; {expected}") from None
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return Agent(name=name, function=function, is_async=is_async)


def reward_of(returned: Any) -> float | None:
    """The reward an agent returned. Raises ValueError for what is neither a finite number nor None.

    An object of the agent's own may raise anything else when it is converted.
    """
    if returned is None:
        return None
    if not isinstance(returned, SupportsFloat):
        raise ValueError(f"the agent returned a {type(returned).__name__}; expected a finite number or None")
    try:
        value = float(returned)
    except (TypeError, OverflowError) as error:  # an array of several numbers; an integer beyond all floats
        kind = type(returned).__name__
        raise ValueError(f"the agent returned a {kind}: {error}; expected a finite number or None") from error
    if not math.isfinite(value):
        raise ValueError(f"the agent returned {value}; expected a finite number or None")
    return value


class AgentExit(Exception):
    """An agent called sys.exit."""

    def __init__(self, code: object) -> None:
        super().__init__(f"the agent exited with {code!r}")


class AgentCalls:
    """Calls of agents under way, and those that could not be ended: `hung`.

    A plain function gets a daemon thread: a hung one does not keep the process from ending. The caller bounds how many
    run at once.
    """

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def hung(self) -> int:
        """Calls that go on though nobody waits for them."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        return len(self._threads) + len(self._tasks)

    async def end(self, work: asyncio.Task[Any]) -> None:
        """Cancels a call that has not ended, and lets it clean up for CANCEL_SECONDS; then it counts as hung."""
        if work.done():
            return
        work.cancel()
        await asyncio.wait({work}, timeout=CANCEL_SECONDS)
        if not work.done():
            self._tasks.add(work)
            work.add_done_callback(self._tasks.discard)
        elif not work.cancelled():
            work.exception()  # seen: the attempt's end is its timeout or its stop, not what came of it

    async def run_in_thread(self, call: Callable[[], Any]) -> Any:
        """What `call` returns or raises. When cancelled, the thread is abandoned."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def settle(returned: Any, error: BaseException | None) -> None:
            if result.done():  # abandoned
                return
            if error is None:
                result.set_result(returned)
            else:
                result.set_exception(error)

        def in_thread() -> None:
            returned, failure = None, None
            try:
                returned = context.run(call)
            except (SystemExit, StopIteration) as error:  # neither may be raised by a future
                failure = AgentExit(getattr(error, "code", repr(error)))
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, returned, failure)

        thread = threading.Thread(target=in_thread, name="agent", daemon=True)
        thread.start()
        try:
            return await result
        except asyncio.CancelledError:
            self._threads.add(thread)
            raise

"""How many tokens a rollout may use, and how long a call may take.

Tokens are counted from answers, after they were given: the call that crosses the bound is answered in full, the next
one is refused. Calls under way at the same time may so overrun it together. Counted in this process only and forgotten
with it, as the bound is there to stop an agent that loops, not to bill anybody. Knows neither HTTP nor backends.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from fulgurite.producers.gateway.errors import ApiError, Headers

HEADER_TIMEOUT: Final = "x-request-timeout"
"""Seconds that the agent will wait for its answer to begin."""
CLIENT_TIMEOUTS: Final = ("x-stainless-read-timeout", "x-stainless-timeout")
"""The same, as the clients of OpenAI and Anthropic say it of themselves."""
LEAST_SECONDS: Final = 0.001


class BudgetSpent(ApiError):
    """429 that no retry helps against; OpenAI's and Anthropic's clients heed the header."""

    @property
    def retriable(self) -> bool:
        return False

    def headers(self) -> Headers:
        return [(b"x-should-retry", b"false")]


class Budgets:
    """Tokens used per rollout. Bounded: the rollout silent for longest is forgotten first."""

    def __init__(self, max_tokens: int, max_rollouts: int = 100_000) -> None:
        """`max_tokens` 0: no bound, nothing is counted."""
        self._max_tokens = max_tokens
        self._max_rollouts = max_rollouts
        self._used: OrderedDict[str, int] = OrderedDict()

    def check(self, rollout_id: str) -> None:
        """Raises BudgetSpent when the rollout has no tokens left. A call outside any rollout has no budget."""
        if not self._max_tokens or not rollout_id:
            return
        used = self._used.get(rollout_id, 0)
        if used >= self._max_tokens:
            message = (
                f"rollout {rollout_id} has used {used} tokens; the bound gateway.max_rollout_tokens is "
                f"{self._max_tokens}"
            )
            raise BudgetSpent(429, "token_budget", message)

    def spent(self, rollout_id: str, tokens: int) -> None:
        """An answer cost so many, the prompt's included."""
        if not self._max_tokens or not rollout_id or tokens <= 0:
            return
        self._used[rollout_id] = self._used.pop(rollout_id, 0) + tokens
        if len(self._used) > self._max_rollouts:
            self._used.popitem(last=False)


def allowed_seconds(headers: Mapping[str, str], most_seconds: float) -> float:
    """How long a call may take: gateway.backend_seconds, or less where the agent waits for less.

    Raises ApiError(400) for a header x-request-timeout that is no time. What clients say of themselves is not held
    against them: "NOT_GIVEN" and the like count as nothing said.
    """
    allowed = most_seconds
    for name in (HEADER_TIMEOUT, *CLIENT_TIMEOUTS):
        said = headers.get(name)
        if said is None:
            continue
        seconds = _positive(said)
        if seconds is not None:
            allowed = min(allowed, seconds)
        elif name == HEADER_TIMEOUT:
            raise ApiError(400, "invalid_timeout", f"{HEADER_TIMEOUT} must be seconds above 0, for example 30")
    return max(allowed, LEAST_SECONDS)


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None

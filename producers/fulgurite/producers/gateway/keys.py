"""API keys of agents, and what a bearer token may carry beside one.

    Authorization: Bearer fg-<rollout_id>/<attempt_id>              ids alone, for a gateway without keys
    Authorization: Bearer fg-<rollout_id>/<attempt_id>/<api key>    both
    Authorization: Bearer <api key>                                 a key alone; ids by path, by header or not at all

So an agent that can only set OPENAI_BASE_URL and OPENAI_API_KEY is traceable. Ids hold no slash; a key may.

A key is fgk-<name>-<secret>, the secret being 256 random bits. The settings know its name and a salted hash, so who
reads them cannot ask. A key is looked up by its name, which is no secret, and compared in constant time. Keys are never
logged: errors and metrics say names, and only names that the settings have.

Knows neither HTTP nor backends; the clock is passed in.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from fulgurite.producers.gateway.errors import ApiError, Headers
from fulgurite.schemas.addresses import is_loopback
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import ApiKeySettings, GatewaySettings

PREFIX_IDS: Final = "fg-"
PREFIX_KEY: Final = "fgk-"
SECRET_CHARS: Final = 43
"""Of 32 bytes in base64url."""
MAX_KEY_CHARS: Final = 512
BURST_SHARE: Final = 0.1
"""Of the requests of a minute, how many may come at once."""


@dataclass(slots=True, frozen=True)
class Bearer:
    """What a bearer token says. All are empty where there is none; an id that is missing is the caller's to refuse."""

    key: str = ""
    rollout_id: str = ""
    attempt_id: str = ""


def parse_bearer(authorization: str) -> Bearer:
    """Of the header Authorization. Another scheme than Bearer says nothing."""
    scheme, _, token = authorization.partition(" ")
    return parse_token(token.strip()) if scheme.lower() == "bearer" else Bearer()


def parse_token(token: str) -> Bearer:
    """Of the token alone, as Anthropic's clients send it in x-api-key."""
    if not token.startswith(PREFIX_IDS):
        return Bearer(key=token)
    rollout_id, _, rest = token.removeprefix(PREFIX_IDS).partition("/")
    attempt_id, _, key = rest.partition("/")
    return Bearer(key, rollout_id, attempt_id)


def new_key(name: str) -> tuple[str, str]:
    """A new (key, hash): the key for whoever asks, the hash for the settings."""
    key = f"{PREFIX_KEY}{name}-{secrets.token_urlsafe(32)}"
    salt = secrets.token_hex(16)
    return key, f"sha256:{salt}:{_digest(salt, key)}"


def ensure_guarded(settings: GatewaySettings) -> None:
    """Raises StartError where anybody on the network could ask: no keys, and not on loopback."""
    if settings.api_keys or settings.insecure or is_loopback(settings.host):
        return
    raise StartError(
        f"gateway.host is {settings.host or 'every address'}, there are no API keys: anybody who reaches it could ask. "
        "Make one (`fulgurite gateway-key NAME`) and put it into gateway.api_keys, listen on 127.0.0.1, or set "
        "gateway.insecure"
    )


class TooOften(ApiError):
    """429 that says when to come back."""

    def __init__(self, code: str, message: str, after_seconds: float) -> None:
        super().__init__(429, code, message)
        self.after_seconds = after_seconds

    def headers(self) -> Headers:
        return [(b"retry-after", str(max(1, math.ceil(self.after_seconds))).encode())]


_NOBODY: Final = nullcontext("")


class Keys:
    """Who may ask, and how often."""

    def __init__(self, settings: Sequence[ApiKeySettings], clock: Callable[[], float] = time.monotonic) -> None:
        self._holders = {key.name: _Holder(key, clock()) for key in settings}
        self._clock = clock

    def held(self, key: str) -> AbstractContextManager[str]:
        """The name of the key's holder, while a call of theirs is under way; empty where no keys are configured.

        Raises ApiError: 401 for no key or a wrong one, 429 where the key's bounds are reached.
        """
        return self._held(key) if self._holders else _NOBODY

    @contextmanager
    def _held(self, key: str) -> Generator[str]:
        holder = self._holder(key)
        holder.enter(self._clock())
        try:
            yield holder.name
        finally:
            holder.leave()

    def _holder(self, key: str) -> _Holder:
        if not key:
            message = (
                "this gateway needs an API key: Authorization: Bearer <key>, or Bearer fg-<rollout>/<attempt>/<key>"
            )
            raise ApiError(401, "missing_api_key", message)
        # The name first: comparing with every holder's hash would cost a hash each.
        holder = self._holders.get(key[len(PREFIX_KEY) : -SECRET_CHARS - 1]) if len(key) <= MAX_KEY_CHARS else None
        if holder is None or not holder.matches(key):
            raise ApiError(401, "invalid_api_key", "the API key is not one of this gateway's")
        return holder


class _Holder:
    """One key's bounds: a token bucket for the rate, a count for what is under way."""

    def __init__(self, settings: ApiKeySettings, now: float) -> None:
        self.name = settings.name
        _, self._salt, self._hash = settings.hash.split(":")
        self._per_minute = settings.requests_per_minute
        self._most_at_once = settings.max_concurrent_requests
        self._burst = max(1.0, self._per_minute * BURST_SHARE)
        self._tokens = self._burst
        self._filled_at = now
        self._under_way = 0

    def matches(self, key: str) -> bool:
        return hmac.compare_digest(_digest(self._salt, key), self._hash)

    def enter(self, now: float) -> None:
        if self._most_at_once and self._under_way >= self._most_at_once:
            message = f"{self._most_at_once} calls with the key {self.name} are under way, which is its bound"
            raise TooOften("key_concurrency", message, 1.0)
        if self._per_minute:
            per_second = self._per_minute / 60
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * per_second)
            self._filled_at = now
            if self._tokens < 1:
                message = f"the key {self.name} is good for {self._per_minute} requests a minute"
                raise TooOften("key_rate", message, (1 - self._tokens) / per_second)
            self._tokens -= 1
        self._under_way += 1

    def leave(self) -> None:
        self._under_way -= 1


def _digest(salt: str, key: str) -> str:
    # "replace": what cannot be encoded is a wrong key, not an error of ours.
    return hashlib.sha256(salt.encode() + key.encode("utf-8", "replace")).hexdigest()

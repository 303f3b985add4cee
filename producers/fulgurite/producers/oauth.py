"""Tokens for SASL/OAUTHBEARER: from a file that somebody keeps fresh, or from a token endpoint by client credentials.

Promises: one token a process and setting, whatever number of clients, loops and threads ask; a new one is fetched
before the old one ends (brokers end a connection whose token has ended, and the client connects again). What goes wrong
is a KafkaError: an endpoint that is away passes (KafkaConnectionError), one that refuses us does not
(AuthenticationFailedError). Tokens and secrets are never logged.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from typing import Any

import httpx
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError

from fulgurite.schemas.settings import KafkaSettings

REQUEST_SECONDS = 10.0
"""Longest that the token endpoint may take."""

REFRESH_SHARE = 0.8
"""Of its life a token is used; then the next connection fetches another."""

DEFAULT_LIFE_SECONDS = 300.0
"""Where the endpoint does not say how long a token lives."""


def token_provider(settings: KafkaSettings) -> TokenProvider:
    """The one of these settings."""
    with _providers_lock:
        for known in _providers:
            if known.settings == settings:
                return known
        _providers.append(TokenProvider(settings))
        del _providers[:-MAX_PROVIDERS]
        return _providers[-1]


MAX_PROVIDERS = 16
"""A process has one; tests have some."""


class TokenProvider(AbstractTokenProvider):
    """aiokafka asks it once a connection, from any loop."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._token = ""
        self._refresh_at = 0.0

    async def token(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]: its base lacks the type
        return await asyncio.to_thread(self._fresh)

    def _fresh(self) -> str:
        path = self.settings.oauth_token_file
        if path is not None:
            try:
                return path.read_text().strip()
            except OSError as error:
                raise KafkaConnectionError(f"cannot read kafka.oauth_token_file {path}: {error.strerror}") from None
        with self._lock:
            if time.monotonic() >= self._refresh_at:
                self._token, seconds = self._fetch()
                self._refresh_at = time.monotonic() + seconds * REFRESH_SHARE
            return self._token

    def _fetch(self) -> tuple[str, float]:
        """A token and how many seconds it lives (RFC 6749, 4.4)."""
        settings = self.settings
        secret = settings.oauth_client_secret.get_secret_value() if settings.oauth_client_secret else ""
        form = {"grant_type": "client_credentials"} | ({"scope": settings.oauth_scope} if settings.oauth_scope else {})
        url = settings.oauth_url or ""
        try:
            answer = httpx.post(
                url,
                data=form,
                auth=(settings.oauth_client_id or "", secret),
                timeout=REQUEST_SECONDS,
                verify=ssl.create_default_context(cafile=settings.oauth_cafile),
            )
        except httpx.HTTPError as error:
            raise KafkaConnectionError(f"the token endpoint {url} does not answer: {error!r}") from None
        if answer.status_code >= 500 or answer.status_code == 429:
            raise KafkaConnectionError(f"the token endpoint {url} answered {answer.status_code}")
        found = _object(answer)
        token, seconds = found.get("access_token"), found.get("expires_in", DEFAULT_LIFE_SECONDS)
        if answer.status_code != 200 or not isinstance(token, str) or not token:
            why = found.get("error_description") or found.get("error") or "no access_token in its answer"
            raise AuthenticationFailedError(
                f"the token endpoint {url} gave no token ({answer.status_code}: {str(why)[:200]}): check "
                "kafka.oauth_client_id, oauth_client_secret and oauth_scope"
            )
        return token, float(seconds) if isinstance(seconds, int | float) else DEFAULT_LIFE_SECONDS


_providers: list[TokenProvider] = []
_providers_lock = threading.Lock()


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

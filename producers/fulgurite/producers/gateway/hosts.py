"""Which hosts a request may name, for a gateway that lets everybody in: a page of another site must not ask it.

A browser on this machine reaches loopback for any page it shows. Such a page says its site in Origin, or, where its
name was made to resolve to 127.0.0.1 (DNS rebinding), in Host. Agents say neither, but for the Host they were given.

Knows nothing of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import urlsplit

from fulgurite.producers.gateway.errors import ApiError
from fulgurite.schemas.addresses import is_loopback
from fulgurite.schemas.settings import GatewaySettings

MAX_PASSED: Final = 64


class Hosts:
    """Of one gateway. With API keys, or with gateway.insecure, any host may be named."""

    def __init__(self, settings: GatewaySettings, refused: Callable[[str], None]) -> None:
        """`refused` is told the code of each refusal."""
        self._refused = refused
        self._guards = not settings.api_keys and not settings.insecure
        self._own = {settings.host.lower(), _host_of(settings.url)} - {""}
        self._passed: set[bytes] = set()
        """Host headers that were looked at and are ours: nearly all calls name the same."""

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises ApiError(403). Every header counts: a second one may be what another reader goes by."""
        if not self._guards:
            return
        for name, value in headers:
            if name == b"host" and value and not self._passes(value):
                message = "the Host is neither loopback nor gateway.url's; set gateway.url to where agents find it"
                raise self._refusal("forbidden_host", f"{message}, or use API keys")
            if name == b"origin" and not self._is_own(_host_of(value.decode("latin-1"))):
                raise self._refusal("forbidden_origin", "pages of other sites may ask only with API keys")

    def _refusal(self, code: str, message: str) -> ApiError:
        self._refused(code)
        return ApiError(403, code, message)

    def _passes(self, value: bytes) -> bool:
        if value in self._passed:
            return True
        if not self._is_own(_host_of(f"//{value.decode('latin-1')}")):
            return False
        if len(self._passed) < MAX_PASSED:
            self._passed.add(value)
        return True

    def _is_own(self, host: str) -> bool:
        return host in self._own or host.endswith(".localhost") or is_loopback(host)


def _host_of(url: str) -> str:
    """Lower case, without port and brackets; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

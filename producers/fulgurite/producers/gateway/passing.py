"""What of headers and query passes between agents and backends: what is named here, and nothing else. Pure functions.

Never a credential: what an agent logs in with is handed on by the settings alone (replica.py), and what is called like
one in a query is taken out. Values with anything but printable ASCII in them, and long ones, stay here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote_plus

from fulgurite.producers.gateway.errors import Headers
from fulgurite.producers.gateway.exchange import BackendKind

REQUEST_ID: Final = "x-request-id"
IDEMPOTENCY_KEY: Final = "idempotency-key"
TO_PROVIDER: Final = (
    REQUEST_ID,
    IDEMPOTENCY_KEY,
    "openai-organization",
    "openai-project",
    "openai-beta",
    "anthropic-version",
    "anthropic-beta",
)
TO_POLICY: Final = (REQUEST_ID,)
TO_AGENT: Final = frozenset(
    {REQUEST_ID, "request-id", "retry-after", "retry-after-ms", "x-should-retry", "openai-processing-ms"}
)
"""Of a provider. Of a policy's server only the id of the request."""
TO_AGENT_BY_PREFIX: Final = ("x-ratelimit-", "anthropic-ratelimit-")
CREDENTIALS: Final = frozenset(
    {
        "key",
        "apikey",
        "api_key",
        "api-key",
        "token",
        "access_token",
        "access-token",
        "authorization",
        "signature",
        "sig",
    }
)
"""Names of a query's parameters, in lower case."""
MAX_CHARS: Final = 1_000
MAX_HEADERS: Final = 32


def headers_of_agent(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a request's headers (lower-case names) those that a backend may see."""
    return {name: value for name in TO_PROVIDER if (value := headers.get(name)) and _is_plain(value)}


def query_of_agent(query: bytes) -> str:
    """Of a request's query what a provider may see: none of it where it is odd."""
    text = query.decode("latin-1")
    if not _is_plain(text) or " " in text:
        return ""
    parts = text.split("&")
    return "&".join(part for part in parts if unquote_plus(part.partition("=")[0]).lower() not in CREDENTIALS)


def headers_for(kind: BackendKind, headers: Mapping[str, str]) -> str:
    """The lines of a request's head."""
    names = TO_PROVIDER if kind == "openai" else TO_POLICY
    return "".join(f"{name}: {headers[name]}\r\n" for name in names if name in headers)


def headers_from(kind: BackendKind, headers: Mapping[str, str]) -> Headers:
    """What the agent is told of an answer's head."""
    found = [
        (name.encode(), value.encode())
        for name, value in headers.items()
        if (name == REQUEST_ID or (kind == "openai" and (name in TO_AGENT or name.startswith(TO_AGENT_BY_PREFIX))))
        and _is_plain(value)
        and _is_plain(name)
    ]
    return found[:MAX_HEADERS]


def added(headers: Headers, more: Headers) -> Headers:
    """Without those of `more` that are there already."""
    there = {name for name, _ in headers}
    return [*headers, *(each for each in more if each[0] not in there)]


def _is_plain(text: str) -> bool:
    return len(text) <= MAX_CHARS and text.isascii() and text.isprintable()

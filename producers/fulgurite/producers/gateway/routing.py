"""What may be asked, and which backends serve a model: by the names they are said to serve, and those they list
themselves. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from fulgurite.producers.gateway.exchange import BackendKind

ROUTES: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        # For the gateway itself: exact prompts of conversations that go on (token_flow.py).
        "/v1/chat/completions/render",
        "/inference/v1/generate",
        "/v1/chat/completions/derender",
        "/detokenize",
    }
)

UNVERSIONED: Final = frozenset({"/v1/chat/completions/render", "/v1/chat/completions/derender", "/detokenize"})
"""Nothing is sampled there: which version the server has does not matter."""


class Server(Protocol):
    """What routing needs to know of a backend."""

    @property
    def kind(self) -> BackendKind: ...

    def serves(self, model: str) -> bool:
        """Whether it is known to."""
        ...

    @property
    def takes_any(self) -> bool:
        """Whether it also gets what nobody is known to serve: its settings name no models."""
        ...


S = TypeVar("S", bound=Server)


def named(servers: Sequence[S], model: str) -> list[S]:
    """Those known to serve it. No model at all means the policy's own servers, which have a default."""
    if not model:
        return [server for server in servers if server.kind == "vllm"] or list(servers)
    return [server for server in servers if server.serves(model)]


def others(servers: Sequence[S]) -> list[S]:
    """Those to ask for a model that nobody is known to serve.

    External providers before the policy's own servers: those list what they serve, so what no list has is not theirs.
    Where there is no provider theirs is the say, and the error.
    """
    takes_any = [server for server in servers if server.takes_any]
    return [server for server in takes_any if server.kind == "openai"] or takes_any

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


LOST_ADAPTERS: Final = -1
"""A server was started anew and will get its adapters back: what it has below them is not what was asked for."""


class Server(Protocol):
    """What routing needs to know of a backend."""

    @property
    def kind(self) -> BackendKind: ...

    @property
    def well(self) -> bool: ...

    def newest_adapter(self, resource: str) -> int | None:
        """The newest version of the resource that it is known to have as an adapter; LOST_ADAPTERS if it had some."""
        ...

    @property
    def numbered(self) -> bool:
        """Whether its weights have a version, or had one."""
        ...

    @property
    def unnumbered(self) -> bool:
        """Whether its weights have no version, and are what is asked for."""
        ...

    @property
    def names(self) -> set[str]:
        """Models it is known to serve."""
        ...

    def serves(self, model: str) -> bool:
        """Whether it is known to."""
        ...

    @property
    def takes_any(self) -> bool:
        """Whether it also gets what nobody is known to serve: its settings name no models."""
        ...

    def may_list(self, model: str) -> bool:
        """Whether it may turn out to serve the model: it lists what it serves, and has not done so yet."""
        ...

    def owns(self, model: str) -> bool:
        """Whether the model is called as its resource, or as an adapter of it."""
        ...


S = TypeVar("S", bound=Server)


def named(servers: Sequence[S], model: str) -> list[S]:
    """Those known to serve it. No model at all means the policy's own servers, which have a default."""
    if not model:
        return [server for server in servers if server.kind == "vllm"] or list(servers)
    return [server for server in servers if server.serves(model)]


def with_newest_adapter(servers: Sequence[S], resource: str) -> list[S]:
    """Those known to have the newest adapter of a resource; of all that are well, if any is. None where none has one.

    So its name alone, `policy`, means the newest of its adapters, also where the weights below them have that name.
    """
    having = {server: version for server in servers if (version := server.newest_adapter(resource)) is not None}
    usable = [server for server in having if server.well] or list(having)
    newest = max((having[server] for server in usable), default=None)
    return [server for server in usable if having[server] == newest]


def without_version(servers: Sequence[S]) -> list[S]:
    """Those whose weights have no version, where they had one, or another server of the same model has or had one.

    Such a server was started anew, or is new, and the follower will give it the version: what it has until then is not
    what was asked for. It is waited for also where it is the only one, as for a lost adapter.
    """
    numbered = [server for server in servers if server.numbered]
    return [
        server
        for server in servers
        if server.unnumbered and any(other is server or server.names & other.names for other in numbered)
    ]


def others(servers: Sequence[S], model: str) -> list[S]:
    """Those to ask for a model that nobody is known to serve.

    External providers before the policy's own servers: those list what they serve, so what no list has is not theirs.
    Where there is no provider, and for what is called as a policy, theirs is the say, and the error: a policy's prompts
    go to no stranger.
    """
    takes_any = [server for server in servers if server.takes_any]
    if any(server.owns(model) for server in servers):
        return [server for server in takes_any if server.kind == "vllm"]
    return [server for server in takes_any if server.kind == "openai"] or takes_any


def unheard(servers: Sequence[S], model: str) -> list[S]:
    """Those to hear of before a provider is asked for a model that nobody is known to serve: it may be theirs."""
    found = others(servers, model)
    if found and found[0].kind == "vllm":
        return []
    return [server for server in servers if server.may_list(model)]

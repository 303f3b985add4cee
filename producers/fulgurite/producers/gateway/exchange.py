"""What the gateway's flow and its pool of backends say to each other: an Ask goes in, an Exchange comes out.

The flow (`app.py`) knows what is asked and what is made of the answer; the pool (`pool.py`) knows who may be asked, how
often, and which of them is well. Neither knows the other's inside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

BackendKind = Literal["vllm", "openai"]
"""`vllm`: serves the policy, gives token ids and logprobs, follows versions (vLLM, or the embedded server).
`openai`: an external provider, asked what the agent asked, streams also for their usage."""


@dataclass(slots=True, frozen=True)
class Ask:
    """One question to whichever backend serves the model."""

    model: str
    route: str
    """Path and query below the backend's URL: /v1/chat/completions."""
    body_for: Callable[[BackendKind], bytes]
    """The body for a backend of a kind: only the policy's own servers are asked for token ids."""
    authorization: str
    """The agent's own header, as it came; handed on only where the backend's settings say so."""
    pin: str
    """What stays on one replica while that is well, for its prefix cache: the rollout_id, else empty."""
    deadline: float
    """Of the event loop's clock: until then a first byte may be waited for, over all tries."""
    whole_deadline: float = 0.0
    """The same for an answer that comes whole, its first byte with its last: until then it is waited for of who works
    on it, and is well. What is not later than `deadline` says nothing."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of the agent's, those that a provider may see."""
    query: str = ""
    """The agent's, for a provider."""
    newest_adapter: bool = False
    """Whether the model is a resource that is served as adapters: each replica means its newest. The pool says so."""
    without: frozenset[str] = frozenset()
    """Endpoints that are not asked while there are others: they were found not to answer this."""
    past_bounds: bool = False
    """Whether it passes the lines and bounds of backends that are well: a small question, without which an answer that
    was sampled would be lost."""


class Exchange(Protocol):
    """One try that was answered: the status is known, the body is still coming. Another replica is tried only where its
    reader says so, see `Answers`."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Lower-case names."""
        ...

    @property
    def kind(self) -> BackendKind: ...

    @property
    def endpoint(self) -> str:
        """The replica's URL, as it is recorded."""
        ...

    @property
    def resource(self) -> str:
        """The resource that the replica serves; empty for an external provider."""
        ...

    @property
    def tries(self) -> int:
        """How many were made until this one, over all replicas."""
        ...

    @property
    def adapter_version(self) -> int | None:
        """The version of the adapter that answers; None where the server's own weights do. Labels are theirs alone."""
        ...

    @property
    def version_before(self) -> str | None:
        """Label of its weights when it was asked, where the server does not put versions into its answers."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, bounded. Raises ApiError: 502 when the connection breaks or the body is too large,
        504 when nothing comes for too long."""
        ...

    async def version_after(self) -> str | None:
        """As `version_before`, asked again after the body was read."""
        ...

    def works(self) -> None:
        """Some of its answer has passed on."""
        ...

    def succeeded(self) -> None:
        """All of the answer came, though its body may go on. Of a body that was read to its end nobody needs to say."""
        ...

    def failed(self, why: str) -> None:
        """Its body was no answer, which only the reader can tell: a stream without an end."""
        ...


class Answers(Protocol):
    """The block of `Backends.open`: gives an Exchange, and another one while nothing of it has reached the agent."""

    async def __aenter__(self) -> Exchange: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def blame(self, why: str, *, reported: bool) -> None:
        """Who was asked is at fault for a body that broke off. For one that `reported` a failure, as `Pool` says."""
        ...

    def may_ask_again(self, why: str, *, reported: bool) -> bool:
        """Gives the Exchange up, whose body broke off, or `reported` that it failed. Whether `again` may be called."""
        ...

    async def again(self) -> Exchange:
        """Another try's. Raises ApiError as `open`."""
        ...


class Backends(Protocol):
    """The pool. `open` raises ApiError: 404 for a model nobody serves, 429 where a bound is reached, 502 when backends
    broke their connection over this request again and again, 503 when nobody could answer until the deadline, 504 when
    somebody was still at it."""

    def open(self, ask: Ask) -> Answers: ...

    async def follows_policy(self, model: str, deadline: float, authorization: str) -> bool:
        """Whether only the policy's own servers are known to serve the model, once all were asked what they serve; with
        the agent's header where one says so to nobody else."""
        ...

    def endpoints(self, model: str) -> frozenset[str]:
        """Of the replicas that serve the model and are well."""
        ...

    def preferred(self, model: str, pin: str) -> str:
        """Endpoint of the replica that would be asked now with this pin; empty where none is known to serve it."""
        ...

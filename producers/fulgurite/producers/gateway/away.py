"""A try of a backend that gave no answer of the model: what says so, and how many of them one request may have."""

from __future__ import annotations

from typing import Final

from fulgurite.producers.gateway.exchange import BackendKind
from fulgurite.producers.gateway.http_exchange import HttpExchange

AWAY_STATUSES: Final = frozenset({502, 503, 504})
"""A swap, a restart, a full queue: said before anything was sampled."""
FAILED_STATUS: Final = 500
"""What a vLLM says whose engine died, until its process ends; and of one request at which it failed, by itself well."""
WORKED_STATUSES: Final = frozenset({502, 504})
"""A provider's own gateway gave up waiting: the provider may have worked on the request, and want to be paid."""
MAX_BROKEN_TRIES: Final = 4
"""Of one request. More than a rolling restart of its backends breaks."""
MAX_PROVIDER_TRIES: Final = 2
"""Of one request, where a provider may have worked on each."""


def had_it(kind: BackendKind, status: int) -> bool:
    """Whether who says this may have worked on the request, or died of it: that bounds the tries."""
    return status == FAILED_STATUS if kind == "vllm" else status in WORKED_STATUSES


def most_tries(kind: BackendKind) -> int:
    """Of one request, where each ends with a backend that had it."""
    return MAX_BROKEN_TRIES if kind == "vllm" else MAX_PROVIDER_TRIES


class Away(Exception):
    """A try that gave no answer of the model."""

    def __init__(self, why: str, *, most_tries: int = 0, said: HttpExchange | None = None) -> None:
        super().__init__(why)
        self.most_tries = most_tries
        """Of one request that may end with a backend that had it; 0: it had not, any number."""
        self.said = said
        """Its own error, for the agent where nobody else is asked. Whoever catches it closes it."""

    @property
    def reported(self) -> bool:
        """Whether a vLLM said itself that it failed."""
        return self.said is not None and self.said.status == FAILED_STATUS

"""What an algorithm remembers between inputs. Direction: algorithms -> themselves, after a restart.

`algorithm_state` is compacted by its key, <algorithm>/<name>: the newest record of a name is what is remembered, one
without a value says that nothing is. Written in the transaction that publishes what followed from it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fulgurite.schemas.event import Event, Name, TimeNs
from fulgurite.schemas.ids import now_ns


class AlgorithmState(Event):
    """Topic `algorithm_state`."""

    algorithm: Annotated[Name, Field(min_length=1)]
    name: Annotated[Name, Field(min_length=1)]
    """Of what is remembered: a group's id, a search's run_id."""
    value: Any = None
    time_ns: TimeNs = Field(default_factory=now_ns)

    @property
    def key(self) -> str:
        return f"{self.algorithm}/{self.name}"

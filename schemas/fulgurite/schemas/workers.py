"""A runner's sign of life. Direction: coordinator (for runners that beat over HTTP) -> materialiser."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fulgurite.schemas.event import Event, TimeNs
from fulgurite.schemas.ids import Id, now_ns


class WorkerHeartbeat(Event):
    """Topic `workers`, key worker_id; compacted, so the newest stays."""

    worker_id: Id
    time_ns: TimeNs = Field(default_factory=now_ns)
    status: Literal["idle", "busy", "stopped"] = "idle"
    running: list[Id] = Field(default_factory=list)
    """attempt_ids it works on."""
    capacity: Annotated[int, Field(ge=0)] = 0
    stats: dict[str, Any] = Field(default_factory=dict)

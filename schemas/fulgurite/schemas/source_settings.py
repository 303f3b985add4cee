"""The settings of a trainer that asks for no rollouts and trains on those of another run: a replay, or a shadow.

What cannot go together is refused by the trainer's plan before anything is loaded. Knows nothing of the trainer's code.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fulgurite.schemas.ids import OptionalId
from fulgurite.schemas.sections import Section


class SourceSettings(Section):
    run_id: str = ""
    """The run whose rollouts are trained on; empty: the trainer asks for its own. Settings of trainer that are not set
    are those of that run, but for run_id, resource, output and tasks."""
    begin: Literal["beginning", "latest", "offset", "time", "sql"] = "beginning"
    """Which of its rollouts. beginning: all; latest: those that come from now on; offset, time: those from
    source.offsets or source.time on; sql: what source.sql selects, of whatever runs; source.run_id then only
    lends its settings."""
    offsets: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict[str, int])
    """For begin = offset: the first offset of `trajectories` by partition, as the column offsets of the table steps has
    it; a partition that is not named is read from its beginning."""
    time: datetime | None = None
    """For begin = time: from groups on whose trajectories all were written then or later (UTC without an offset)."""
    sql: str = ""
    """For begin = sql: a query of ClickHouse with a column rollout_id. Its order is the order of training; rollouts of
    one group_id are compared. Asked once, when the run begins."""
    follow: bool = True
    """Whether to wait for what the source does next; otherwise the run ends where the source has got to."""
    resource: OptionalId = ""
    """Whose sampled tokens are trained on; empty: what the source run trains. Set to trainer.resource where this
    trainer makes the versions of another policy that acts in the same rollouts."""

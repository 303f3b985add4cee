"""The section `retention`: for how many days ClickHouse keeps a row, counted from its record's Kafka time; 0: for ever.
A Kafka time that lies after the insert, or is none, is not believed: it counts from the insert.

For ever is the default of everything that cannot be made again: rewards, trajectories, rollouts and training are what
was paid for, spans are the evidence, and dead letters are records that nobody has looked at yet. Deleting them is a
person's decision, since Kafka forgets too. Heartbeats say only who is alive now: a week of them is enough to see what
happened. Model versions (`resources`) are few, and the log of inserts (`ingest_log`) is what the materialiser resumes
from: both have no retention.

A table of months (spans, rewards, rollout_events, trajectories) drops whole parts, once the last row of a part is old
enough: up to a month later than said. How it is applied: storage.py.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fulgurite.schemas.sections import Section

Days = Annotated[int, Field(ge=0, le=18_250)]
"""Up to 50 years: ClickHouse counts seconds up to 2106, and what should expire later would be gone at once."""


class RetentionSettings(Section):
    spans_days: Days = 0
    """Spans, those of OTLP too: by far the most bytes. 0: for ever."""
    rewards_days: Days = 0
    """Rewards. Keep them as long as trajectories. 0: for ever."""
    rollout_events_days: Days = 0
    """What happened to each rollout. A rollout whose first events are gone is shown by its later ones. 0: for ever."""
    trajectories_days: Days = 0
    """What training is made of. 0: for ever."""
    training_events_days: Days = 0
    """Runs, steps, versions: few rows. 0: for ever."""
    dead_letters_days: Days = 0
    """What could not be used; afterwards it can be neither mended nor replayed. 0: for ever."""
    worker_heartbeats_days: Days = 7
    """Who was alive when. 0: for ever."""

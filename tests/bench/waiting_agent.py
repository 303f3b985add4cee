"""The calculator's agent with a wait as long as a search, a shell or a browser takes: mostly half a second, now and
then several. The demo's own tool takes none: there it is for the processor alone that anybody waits.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from examples.calculator import agent as calculator
from examples.calculator.tasks import Task
from fulgurite.producers.rollout import RolloutContext

MEDIAN_SECONDS: Final = 0.5
SIGMA: Final = 1.0
"""Of the logarithm: one of a hundred waits ten times the median."""
MAX_SECONDS: Final = 8.0


async def agent(task: Task, rollout: RolloutContext) -> float:
    await asyncio.sleep(min(MAX_SECONDS, MEDIAN_SECONDS * random.lognormvariate(0.0, SIGMA)))
    return await calculator.agent(task, rollout)

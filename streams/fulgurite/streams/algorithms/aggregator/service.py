"""The aggregator as an algorithm, and its command. Flow and reasons are in the package, the delivery contract in
streams/algorithms/service.py."""

from __future__ import annotations

import asyncio
import logging

import httpx

from fulgurite.producers.service import run_service
from fulgurite.schemas.settings import AlgorithmSettings, Settings
from fulgurite.streams.algorithms import service as algorithms
from fulgurite.streams.algorithms.aggregator.combine import given_up
from fulgurite.streams.algorithms.aggregator.scoring import Scoring
from fulgurite.streams.algorithms.aggregator.verdicts import Verdicts
from fulgurite.streams.algorithms.definition import Algorithm
from fulgurite.streams.algorithms.memory import Start
from fulgurite.streams.transactions import Hook, no_hook

logger = logging.getLogger(__name__)

NAME = "aggregator"

LONGEST_SECONDS = 86_400.0
"""Of one attempt, judges that are away included: then the process ends, says so, and is started anew."""


def main(settings: Settings) -> int:
    """`fulgurite aggregator`."""
    return run_service(NAME, settings.log, lambda stop: serve(settings, stop))


async def serve(settings: Settings, stop: asyncio.Event, hook: Hook = no_hook) -> None:
    """Until `stop`. An attempt that cannot be scored ends nothing; what else fails is a bug here, and stops."""
    own = AlgorithmSettings(
        tries=1,
        on_error="stop",
        timeout_seconds=LONGEST_SECONDS,
        concurrency=settings.aggregator.concurrency,
    )
    if settings.assembler.output != "attempts":
        logger.warning(
            "assembler.output is %s: nothing comes here until the assembler is started with assembler.output=attempts",
            settings.assembler.output,
        )
    verdicts = Verdicts(settings.aggregator.cache, settings.aggregator.cache_entries)
    limits = httpx.Limits(max_connections=settings.aggregator.max_judge_calls)
    try:
        # A proxy from the environment is for the internet; judges are named by their URL.
        async with httpx.AsyncClient(limits=limits, trust_env=False) as client:
            scoring = Scoring(settings, client, verdicts)
            algorithm = Algorithm(NAME, scoring.score, reads="attempts", instead=given_up)
            changed = settings.model_copy(update={"algorithm": own})
            await algorithms.serve(changed, algorithm, Start(), stop, hook)
    finally:
        verdicts.close()

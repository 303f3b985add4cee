"""The end of a run: whatever is still on its way is cancelled through the coordinator. Best effort, bounded.

The ledger does not depend on it: what does not end in time is recorded as dropped all the same. It exists so that no
runner goes on working for a run that is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.schemas.errors import CoordinatorError

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 2.0
"""A rollout the coordinator does not know yet (it reads the log, too) is asked for again after this."""


async def cancel_outstanding(url: str, outstanding: Callable[[], list[str]], reason: str) -> None:
    """Cancels what `outstanding` names, again and again until it names nothing. Its caller bounds the time."""
    async with CoordinatorClient(url) as client:
        while rollout_ids := outstanding():
            for rollout_id in rollout_ids:
                try:
                    await client.cancel(rollout_id, reason)
                except CoordinatorError as error:  # unknown as yet, or ended already
                    logger.debug("cancelling %s: %s", rollout_id, error)
            await asyncio.sleep(AGAIN_SECONDS)

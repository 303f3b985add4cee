"""The assembler's dead letters: of lines that came too late or belong to nobody, and of rollouts that nothing came of.

Pure; when there is one, others know.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.streams.assembler.lines import lines_of
from fulgurite.streams.assembler.rollouts import Held, Pending

logger = logging.getLogger(__name__)

STAGE = "assembler"
LATE = "late"
UNKNOWN_ROLLOUT = "unknown_rollout"
NOT_ASSEMBLED = "not_assembled"

LETTER_BYTES = 1_024
"""What a dead letter is beside its line: key, headers, object."""


def of_lines(held: Held, reason: str, message: str) -> Iterator[DeadLetter]:
    """One for each line of the rollout in a record."""
    assert held.value is not None
    tp = held.tp
    for number, line in lines_of(held.rollout_id, held.value):
        yield DeadLetter(tp.topic, tp.partition, held.offset, STAGE, reason, message, held.key, line, number)


def of_rollout(pending: Pending, error: Exception) -> DeadLetter:
    """Of the `finished` whose trajectory could not be made: its records are in the tables, and none is known to be at
    fault. The log has the traceback."""
    problem = f"rollout {pending.event.rollout_id}: no trajectory can be made of it: {type(error).__name__}: {error}"
    logger.error("%s; it is sent without data", problem, exc_info=error)
    tp = pending.tp
    return DeadLetter(tp.topic, tp.partition, pending.offset, STAGE, NOT_ASSEMBLED, problem, pending.key, pending.value)

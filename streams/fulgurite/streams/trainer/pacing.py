"""How far rollouts may run ahead of the policy: the trainer asks for no more than staleness lets it use. Pure.

AReaL's capacity (arXiv:2505.24298, `StalenessManager.get_capacity`): with version v and batches of B, at most
(eta + v + 1) * B rollouts may have been asked for, where rejected ones do not count. All of it is computed from the
run's own counts, which lie in the checkpoint, so a restart cannot unbound it.

Discarding stale rollouts instead wastes what runners computed and biases towards short ones; pacing hardly ever
discards.
"""

from __future__ import annotations


def groups_allowed(
    *,
    steps_done: int,
    steps: int,
    groups_per_step: int,
    pacing_staleness: int,
    groups_dropped: int,
    groups_short: int = 0,
) -> int:
    """How many groups may have been asked for, since the start of the run.

    A group dropped as a whole (stale, failed, too few survivors) gave nothing, so another may be asked for in its
    place; never more are asked for than the remaining steps can use. `groups_short` is how many fewer than
    groups_per_step windows that were closed by time have had: they are still there.

    >>> groups_allowed(steps_done=0, steps=10, groups_per_step=4, pacing_staleness=1, groups_dropped=0)
    8
    """
    ahead = (pacing_staleness + steps_done + 1) * groups_per_step
    return min(ahead, steps * groups_per_step) - groups_short + groups_dropped

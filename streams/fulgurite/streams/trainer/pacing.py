"""How far rollouts may run ahead of the policy: the trainer asks for no more than staleness lets it use. Pure.

AReaL's capacity (arXiv:2505.24298, `StalenessManager.get_capacity`): with version v and batches of B, at most
(eta + v + 1) * B rollouts may have been asked for, where rejected ones do not count. Here v * B and the rejected ones
are counted, not computed: groups that windows had or that were dropped. So it holds for windows of any size, also where
another start of the run has another B. The counts lie in the checkpoint, so a restart cannot unbound it.

Discarding stale rollouts instead wastes what runners computed and biases towards short ones; pacing hardly ever
discards.
"""

from __future__ import annotations


def groups_allowed(*, groups_settled: int, steps_left: int, groups_per_step: int, pacing_staleness: int) -> int:
    """How many groups may have been asked for, since the start of the run.

    A group dropped as a whole (stale, failed, too few survivors) gave nothing, so another may be asked for in its
    place; never more are on their way than the remaining steps can use.

    >>> groups_allowed(groups_settled=0, steps_left=10, groups_per_step=4, pacing_staleness=1)
    8
    """
    return groups_settled + min(pacing_staleness + 1, steps_left) * groups_per_step

"""An algorithm of one's own: says which rollout of each group was the best, and by how much.

    fulgurite algorithm examples.algorithms.best_of_group:best_of_group --from beginning

Each group is given once, with all its trajectories; what is yielded is published exactly once, whatever crashes.
"""

from __future__ import annotations

from collections.abc import Iterator

from fulgurite.schemas.rewards import Reward
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms import algorithm


@algorithm(reads="groups", mode="train")
def best_of_group(group: list[Trajectory]) -> Iterator[Reward]:
    rewards = sorted((member.reward, member.rollout_id) for member in group if member.reward is not None)
    if len(rewards) > 1:
        (second, _), (most, best) = rewards[-2:]
        yield Reward(rollout_id=best, name="best_of_group", value=most - second, source="best_of_group")

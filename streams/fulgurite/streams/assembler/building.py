"""An ended rollout's trajectory, whatever its records hold: one that says why it has no data where building it failed.

What joins records (join.py), and what writes them (outputs.py), may raise for something that nobody thought of in the
records of one rollout. Let out, it would end the service, and again after each restart: the same records come first.
So that rollout's trajectory has nothing but what its `finished` says and `invalid_record` in `partial`, and the
`finished` is a dead letter with the reason. Its spans and rewards are in the tables. Memory that is short is no
fault of the records, and ends the process. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.rewards import FINAL_REWARD
from fulgurite.schemas.trajectories import FinishedAttempt, Trajectory
from fulgurite.streams.assembler.join import INVALID_RECORD, Announcement, Joined, assemble, read_rewards
from fulgurite.streams.assembler.letters import of_rollout
from fulgurite.streams.assembler.rollouts import Pending


def build(
    pending: Pending, announced: Announcement, spans: Sequence[bytes], rewards: Sequence[bytes], *, keep_spans: bool
) -> tuple[Joined, DeadLetter | None]:
    """The trajectory, and what is wrong where there is nothing in it."""
    try:
        return assemble(pending.event, announced, spans, rewards, keep_spans=keep_spans), None
    except MemoryError:
        raise
    except Exception as error:  # whatever the records of one rollout bring about
        return Joined(_of_its_end(pending, announced, keep_spans)), of_rollout(pending, error)


def has_reward(pending: Pending, rewards: Sequence[bytes]) -> bool:
    """Whether a reward among these is the rollout's own."""
    try:
        found, _ = read_rewards(rewards, pending.event, [])
    except MemoryError:
        raise
    except Exception:  # as above. Nothing that may still come would help
        return True
    return any(reward.name == FINAL_REWARD for reward in found)


def without_data(trajectory: Trajectory) -> Trajectory:
    """The same rollout's end, with nothing of its records."""
    words = dict.fromkeys([*filter(None, trajectory.partial.split(",")), INVALID_RECORD])
    changes: dict[str, object] = {"reward": None, "partial": ",".join(words)}
    changes |= {"spans": []} if isinstance(trajectory, FinishedAttempt) else {}
    return trajectory.without_records().model_copy(update=changes)


def _of_its_end(pending: Pending, announced: Announcement, keep_spans: bool) -> Trajectory:
    """Not validated, so that nothing can be wrong with it: its fields were, as those of events."""
    event = pending.event
    same = (
        "rollout_id",
        "attempt_id",
        "run_id",
        "task_id",
        "group_id",
        "group_size",
        "mode",
        "agent",
        "status",
        "error",
    )
    return (FinishedAttempt if keep_spans else Trajectory).model_construct(
        None,
        **{name: getattr(event, name) for name in same},
        partial=INVALID_RECORD,
        queued_ns=announced.queued_ns,
        finished_ns=event.time_ns,
        assembled_ns=now_ns(),
        metadata=announced.metadata,
    )

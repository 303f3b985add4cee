"""What a checkpoint says of a run beside its tensors: state.json, and groups.jsonl with the members of open groups.

Both ways: what windows become when they are written down, and the windows that come back. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field

from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer.groups import Group, Member, Shape
from fulgurite.streams.trainer.windows import Windows

STATE = "state.json"


class OpenGroup(BaseModel):
    index: int
    closed: bool
    version: int | None = None
    size: int | None = None
    left_out: list[str] = Field(default_factory=list)


class SourceState(BaseModel):
    """How far a replay has got in what it replays."""

    offsets: dict[int, int] = Field(default_factory=dict)
    """Next offset per partition of the source's ledger, `training`."""
    step: int = 0
    """The source's last step whose groups were taken over."""
    groups: int = 0
    """Of a selection by SQL: how many of its groups were taken over."""
    over: bool = False
    """Nothing more will come."""


class RunState(BaseModel):
    """state.json: where a run stands at a version."""

    run_id: str
    resource: str
    version: int
    step: int
    sha256: str = ""
    """Of weights/, filled in when it is written."""
    weights_since: int | None = None
    """The first version in a row up to this one with the very files of weights/: a step that was skipped, or had no
    signal, makes a version of the same. Filled in when it is written; None in checkpoints of before."""
    is_mismatched: bool = False
    """Trainer and sampler disagreed when they could last be compared."""
    reference_sha256: str = ""
    """Of the weights that a KL penalty compares with; empty where there was none yet, and in checkpoints of before."""
    lineage: str = ""
    """Of the offsets that are committed with it (`Transactions.lineage`); empty in checkpoints of before."""
    offsets: dict[int, int]
    """Next offset per partition of `trajectories`."""
    asked: int
    """Groups asked for: the cursor over tasks."""
    settled_below: int = 0
    settled: list[int] = Field(default_factory=list)
    missing: list[str] = Field(default_factory=list)
    dropped: list[DroppedRollout] = Field(default_factory=list)
    """Settled, but in no step's record yet."""
    strangers: list[str] = Field(default_factory=list)
    """Named as `not_asked`: not to be named again."""
    passed: dict[str, str] = Field(default_factory=dict)
    """Of a replay by selection: named by a record between versions, their groups still to come."""
    open: list[OpenGroup] = Field(default_factory=list[OpenGroup])
    recent: list[OpenGroup] = Field(default_factory=list[OpenGroup])
    """Of earlier windows, for later ones that slide."""
    source: SourceState | None = None
    """Of a replay."""
    kept: str = ""
    """The file beside the versions that the run trains on: a selection or demonstrations. Empty where it trains on
    neither, and in checkpoints of before."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of the small files beside weights/, by name; empty in checkpoints of before: these are not compared."""
    optimizer_bytes: int | None = None
    """Length of the learner's own state; None: not compared. It is several times the weights: to hash it too would cost
    every version seconds for each GB."""

    @property
    def same_weights_since(self) -> int:
        """`weights_since`, where that is known; else nothing is known of the versions before."""
        return self.version if self.weights_since is None else self.weights_since


class MemberLine(BaseModel):
    group: int
    reason: str
    min_version: int
    max_version: int = 0
    recent: bool = False
    trajectory: Trajectory


def of_windows(windows: Windows) -> dict[str, Any]:
    """The part of the state that the windows hold."""
    return {
        "asked": windows.asked,
        "settled_below": windows.settled_below,
        "settled": sorted(windows.settled),
        "missing": sorted(windows.missing),
        "dropped": list(windows.dropped),
        "strangers": list(windows.strangers),
        "passed": dict(windows.passed),
        "open": [_open(group) for group in windows.groups.values()],
        "recent": [_open(group) for group in windows.recent],
    }


def member_lines(windows: Windows) -> list[MemberLine]:
    return [
        MemberLine(
            group=group.index,
            reason=member.reason,
            min_version=member.min_version,
            max_version=member.max_version,
            recent=recent,
            trajectory=member.trajectory,
        )
        for recent, groups in ((False, windows.groups.values()), (True, windows.recent))
        for group in groups
        for member in group.members.values()
    ]


def restored(state: RunState, lines: Iterable[str], shape: Shape, now_ns: int) -> Windows:
    """The inverse: windows as they were written down, as far as the shape of now has use for them.

    Raises ValueError for lines that are not of this state.
    """
    # Checkpoints of before have no strangers, but those that no record has named yet.
    unnamed = [each.rollout_id for each in state.dropped if each.reason == "not_asked"]
    windows = Windows(
        shape,
        asked=state.asked,
        groups={g.index: _group(g, now_ns) for g in state.open},
        settled_below=state.settled_below,
        settled=set(state.settled),
        missing=set(state.missing),
        dropped=list(state.dropped),
        strangers=dict.fromkeys(state.strangers or unnamed),
        passed=dict(state.passed),
        recent=[_group(g, now_ns) for g in state.recent],
    )
    recent = {group.index: group for group in windows.recent}
    for text in lines:
        line = MemberLine.model_validate_json(text)
        group = (recent if line.recent else windows.groups).get(line.group)
        if group is None:
            raise ValueError(f"a member of group {line.group}, which state.json does not have")
        member = Member(line.trajectory, line.reason, line.min_version, line.max_version)
        group.members[line.trajectory.rollout_id] = member
    windows.forget()
    return windows


def _open(group: Group) -> OpenGroup:
    return OpenGroup(
        index=group.index,
        closed=group.closed,
        version=group.version,
        size=group.size,
        left_out=sorted(group.left_out),
    )


def _group(saved: OpenGroup, now_ns: int) -> Group:
    """Without its members, which are lines of their own."""
    return Group(saved.index, now_ns, {}, saved.closed, saved.version, saved.size, set(saved.left_out))

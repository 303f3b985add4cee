"""The ledger beyond one record for each step: records in parts, and rollouts that are named before the next step.

- A record names all rollouts of its window and whatever was dropped since the last one. What it has no room for goes
  into records before it, in the same transaction (`in_parts`); `whole` puts them together again.
- Where rollouts are dropped for hours, they do not wait in memory for the next step: once there are MOST_UNNAMED, those
  of groups that are over are named between two versions (`take_over`). Offsets and checkpoint stay those of the last
  version, so a restart reads their records again. The log then says that they were named: their groups are over for it,
  too, whatever it would have made of them (`restore`). Groups of which somebody may yet be trained on are never named
  early.

Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from fulgurite.schemas.training import DroppedRollout, RolloutsDecided, RunFinished, TrainingStep
from fulgurite.streams.trainer.windows import Windows

MOST_UNNAMED = 4096
"""Dropped rollouts that wait for the next step's record; with more, they are named before it."""

LedgerEvent = TrainingStep | RolloutsDecided | RunFinished

_LISTS = ("rollout_ids", "again", "dropped")


def in_parts(event: LedgerEvent, max_bytes: int) -> list[LedgerEvent]:
    """As many records as it takes, in the order of the log: the last is the event itself, with what it has room for."""
    if _bytes(event) <= max_bytes:
        return [event]
    bare = _bare_part(event)
    rooms = [max_bytes - _bytes(_with(event, {})), max_bytes - _bytes(bare)]
    filled: list[dict[str, list[Any]]] = [{}]
    left = rooms[0]
    for name in _LISTS:
        for each in getattr(event, name, ()):
            size = (_bytes(each) if isinstance(each, BaseModel) else len(each) + 2) + 1
            if size > left and (filled[-1] or len(filled) == 1):
                filled.append({})
                left = rooms[1]
            filled[-1].setdefault(name, []).append(each)
            left -= size
    parts = [
        bare.model_copy(update={"event_id": f"{event.event_id}-part{number}", **lists})
        for number, lists in enumerate(filled[1:], 1)
    ]
    return [*parts, _with(event, filled[0])]


def whole(event: LedgerEvent, parts: Sequence[RolloutsDecided]) -> LedgerEvent:
    """The event with what its parts say besides."""
    own = [part for part in parts if part.part_of == event.event_id]
    lists = {
        name: [*getattr(event, name), *(each for part in own for each in getattr(part, name))]
        for name in _LISTS
        if name in type(event).model_fields
    }
    return event.model_copy(update=lists)


def is_full(windows: Windows) -> bool:
    """Whether it is time to `take_over`."""
    return len(windows.dropped) - windows.held >= MOST_UNNAMED


def take_over(windows: Windows) -> list[DroppedRollout]:
    """Those dropped rollouts whose groups are over; the others wait with their groups."""
    over: list[DroppedRollout] = []
    held: list[DroppedRollout] = []
    for each in windows.dropped:
        is_open = each.reason != "not_asked" and windows.index_of(each.rollout_id) in windows.groups
        (held if is_open else over).append(each)
    windows.dropped, windows.held = held, len(held)
    _count(windows, [each.reason for each in over])
    return over


def restore(windows: Windows, named: Iterable[DroppedRollout], *, by_rollout: bool) -> None:
    """What records since the last version have named stays so. `by_rollout`: groups are not told by rollouts' names."""
    reasons = {each.rollout_id: each.reason for each in named}
    windows.dropped = [each for each in windows.dropped if each.rollout_id not in reasons]
    _count(windows, reasons.values())
    if by_rollout:
        windows.passed |= reasons
        return
    groups: dict[int, bool] = {}
    for rollout_id, reason in reasons.items():
        index = None if reason == "not_asked" else windows.index_of(rollout_id)
        if index is None:
            windows.strangers[rollout_id] = None
            continue
        if reason == "deadline":
            windows.missing.add(rollout_id)
        groups[index] = groups.get(index, False) or reason == "zero_variance"
    for index, without_signal in sorted(groups.items()):
        _pass_over(windows, index, without_signal)


def passes_over(windows: Windows, index: int, rollout_ids: Collection[str]) -> bool:
    """Whether this group of a selection, the next one, was named already; then it is over."""
    if not rollout_ids or not windows.passed.keys() >= set(rollout_ids):
        return False
    reasons = [windows.passed.pop(rollout_id) for rollout_id in rollout_ids]
    _pass_over(windows, index, "zero_variance" in reasons)
    return True


def _pass_over(windows: Windows, index: int, without_signal: bool) -> None:
    if windows.is_settled(index):
        return
    windows.refilled += without_signal
    if not windows.shape.replayed:
        windows.asked = max(windows.asked, index + 1)  # the ledger knows it, whatever Kafka has forgotten
    windows.mark_settled(index)


def _count(windows: Windows, reasons: Iterable[str]) -> None:
    """Figures in a reason are left out."""
    windows.named.update(reason.partition(":")[0] for reason in reasons)


def _bare_part(event: LedgerEvent) -> RolloutsDecided:
    """With the longest name that it may get."""
    at_end = isinstance(event, RunFinished)
    return RolloutsDecided(
        event_id=f"{event.event_id}-part999999",
        run_id=event.run_id,
        time_ns=event.time_ns,
        step=event.step,
        resource=event.resource,
        version_in=event.version if at_end else event.version_in,
        version_out=event.version if at_end else event.version_out,
        part_of=event.event_id,
    )


def _with(event: LedgerEvent, lists: dict[str, list[Any]]) -> LedgerEvent:
    known = type(event).model_fields
    return event.model_copy(update={name: lists.get(name, []) for name in _LISTS if name in known})


def _bytes(event: BaseModel) -> int:
    return len(event.model_dump_json().encode())

"""From a record of `trajectories` to a member of a group: others' records are skipped, bad ones become dead letters."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from fulgurite.producers.reading import value_of
from fulgurite.schemas.codec import decode
from fulgurite.schemas.dead_letters import DeadLetter
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.rollouts import Mode
from fulgurite.schemas.topics import DEAD_LETTERS
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.reader import Record
from fulgurite.streams.trainer.samples import ModelLimits, member_of
from fulgurite.streams.trainer.windows import Member, Windows
from fulgurite.streams.transactions import Outgoing

logger = logging.getLogger(__name__)

MAX_DEAD_LETTERS = 256
"""Held back for the next version's transaction; with more, they are published at once."""

MAX_DEAD_BYTES = 32 << 20


class _Name(BaseModel):
    rollout_id: str
    group_id: str
    run_id: str
    mode: Mode = "train"


class Intake:
    """Feeds one run's windows. `dead_letters` wait for the transaction that commits the offsets they were read at."""

    def __init__(
        self, plan: Plan, limits: ModelLimits, windows: Windows, buried: Mapping[int, int] | None = None
    ) -> None:
        """`buried`: by partition, below which offset the letters of an earlier life are on the log."""
        self._settings = plan.settings.kafka
        self._run_id = plan.shape.run_id
        self._needle = self._run_id.encode()
        self._resource = plan.sampling_resource
        self._agents = plan.trainer.agents
        self._limits = limits
        self._windows = windows
        # The source run has written the letters of a replay, but for the tokens of another policy than its own.
        self._is_first = not plan.is_replay
        self._judges_first = not plan.is_replay or plan.is_own_policy
        self._buried = dict(buried or {})
        self.dead_letters: list[Outgoing] = []
        self._dead_bytes = 0

    @property
    def is_full(self) -> bool:
        return len(self.dead_letters) > MAX_DEAD_LETTERS or self._dead_bytes > MAX_DEAD_BYTES

    def take_in(self, record: Record, now_ns: int) -> None:
        # Decoding is what reading other runs' records would cost; our name in the bytes is a cheap first sieve.
        if self._needle not in (record.value or b"") and self._needle not in (record.key or b""):
            return
        try:
            trajectory = decode(Trajectory, value_of(record))
        except InvalidEvent as error:
            self._take_in_undecodable(record, now_ns, error)
            return
        if trajectory.run_id == self._run_id and trajectory.mode == "train":
            self._windows.add(self._judged(record, trajectory), now_ns)

    def member(self, record: Record) -> Member | None:
        """The record as a member of its group, whatever its run; None where it is none."""
        try:
            return self._judged(record, decode(Trajectory, value_of(record)))
        except InvalidEvent as error:
            self._bury_undecodable(record, error)
            return None

    def take_dead_letters(self) -> list[Outgoing]:
        taken, self.dead_letters, self._dead_bytes = self.dead_letters, [], 0
        return taken

    def _take_in_undecodable(self, record: Record, now_ns: int, error: InvalidEvent) -> None:
        """A member without data, where it still says whose; else its group's deadline counts. A group of such records
        alone would be waited for for ever. Another run's is left to that run."""
        named, group_id = _named(record), (record.key or b"").decode(errors="replace")
        is_ours = named.run_id == self._run_id if named else group_id.startswith(f"{self._run_id}-g")
        if not is_ours:
            return
        self._bury_undecodable(record, error)
        if named and named.mode == "train":
            self._windows.add(Member(named, "bad_record"), now_ns)
        elif not named:
            self._windows.expect(group_id, now_ns)

    def _bury_undecodable(self, record: Record, error: InvalidEvent) -> None:
        self._bury(record, error.reason, str(error), wanted=self._is_first)

    def _judged(self, record: Record, trajectory: Trajectory) -> Member:
        member, fault = member_of(trajectory, self._resource, self._limits, self._agents)
        if fault:
            self._bury(record, member.reason, f"rollout {trajectory.rollout_id}: {fault}", wanted=self._judges_first)
        return member

    def _bury(self, record: Record, reason: str, message: str, *, wanted: bool) -> None:
        logger.warning("%s partition %d offset %d: %s", record.topic, record.partition, record.offset, message)
        if not wanted or record.offset < self._buried.get(record.partition, 0):
            return
        letter = DeadLetter(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stage="trainer",
            reason=reason,
            message=message,
            key=record.key,
            value=record.value,
        )
        topic = self._settings.topic(DEAD_LETTERS)
        value = letter.value_within(self._settings.max_record_bytes)
        self.dead_letters.append(Outgoing(topic, letter.key, value, letter.headers()))
        self._dead_bytes += len(value or b"")


def _named(record: Record) -> Trajectory | None:
    """Whose trajectory a record was to be, that is none by its schema; None where even that cannot be read."""
    try:
        found = _Name.model_validate_json(record.value or b"")
        return Trajectory(**found.model_dump(), status="failed")
    except ValidationError:
        return None

"""The search's transactions: state, candidates, rollouts to try them, versions, and the offsets that go with them."""

from __future__ import annotations

import json
from typing import Any

from fulgurite.producers.prompts import CANDIDATE_OF, pin_of
from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.resources import prompt_version
from fulgurite.schemas.rollouts import RolloutConfig, RolloutQueued
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import RESOURCES, ROLLOUTS, TRAINING, Topic
from fulgurite.schemas.training import RunFinished, RunStarted, TrainingStep
from fulgurite.streams.algorithms.commits import Commits
from fulgurite.streams.algorithms.memory import remembering
from fulgurite.streams.algorithms.prompts.search import Candidate, Search
from fulgurite.streams.trainer.events import version_event_id
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.tasks import TaskFunction, task_input
from fulgurite.streams.transactions import Outgoing, Transactions

ALGORITHM = "prompt"
"""Under which searches are remembered."""

EXAMPLES_SHARE = 0.25
"""Of the record, for what the critic is shown."""

_CANDIDATE_BYTES = 512
"""Most of a candidate in the record, besides its text and examples."""


class Publishing:
    """Every commit returns when it is committed."""

    def __init__(
        self, settings: Settings, tasks: TaskFunction, reader: TrajectoryReader, transactions: Transactions
    ) -> None:
        self._settings = settings
        self._prompt = settings.prompt
        self._tasks = tasks
        self._reader = reader
        self._commits = Commits(transactions, reader.partitions)

    def room_fault(self, search: Search, text: str) -> str:
        """Why one more template cannot be remembered; empty where it can. All but EXAMPLES_SHARE of the record is for
        templates."""
        known = len(search.model_dump_json(exclude={"candidates": {"__all__": {"examples"}}}).encode())
        size = len(json.dumps(text, ensure_ascii=False).encode())
        most = self._settings.kafka.max_record_bytes
        if known + size + _CANDIDATE_BYTES * (1 + len(search.candidates)) <= most * (1 - EXAMPLES_SHARE):
            return ""
        return f"its {size} bytes have no room in the search's record; kafka.max_record_bytes = {most}"

    async def commit(self, search: Search, records: list[Outgoing]) -> None:
        """The records, what is to be remembered from now on, and the offsets of what was read."""
        search.keep_examples(int(self._settings.kafka.max_record_bytes * EXAMPLES_SHARE))
        state = remembering(self._settings.kafka, ALGORITHM, search.run_id, search.model_dump(mode="json"))
        offsets = {tp: self._reader.offsets[tp.partition] for tp in self._reader.partitions}
        await self._commits.commit([*records, state], offsets)

    def candidate(self, search: Search, candidate: Candidate) -> list[Outgoing]:
        """The candidate under a name of its own, and the rollouts that try it."""
        resource = f"{search.resource}.c{candidate.number}"
        version = prompt_version(
            resource,
            candidate.version,
            candidate.text,
            run_id=search.run_id,
            step=candidate.round,
            metadata={CANDIDATE_OF: search.resource},
        )
        rollouts = [
            self._queued(search, candidate, pin_of(resource, candidate.version), task, rollout_id)
            for task, rollout_id in enumerate(search.rollout_ids(candidate, self._prompt))
        ]
        return [self._record(RESOURCES, resource, version), *rollouts]

    def version(self, search: Search, candidate: Candidate) -> Outgoing:
        """The candidate as a version of the template itself."""
        score = {} if candidate.score is None else {"score": f"{candidate.score:g}"}
        version = prompt_version(
            search.resource,
            search.version,
            candidate.text,
            event_id=version_event_id(search.run_id, search.version),
            run_id=search.run_id,
            step=candidate.round,
            metadata={"candidate": str(candidate.number), **score},
        )
        return self._record(RESOURCES, search.resource, version)

    def started(self, search: Search) -> Outgoing:
        event = RunStarted(
            run_id=search.run_id,
            step=search.round,
            resource=search.resource,
            version=search.version,
            steps_total=self._prompt.rounds + 1,
            config={"prompt": self._prompt.model_dump(mode="json")},
        )
        return self._record(TRAINING, search.run_id, event)

    def round_over(self, search: Search, version_in: int, tried: list[Candidate]) -> Outgoing:
        """A step, as trainers have it: what was tried, and what came of it."""
        best = search.ranked()
        scores = [candidate.score for candidate in tried if candidate.score is not None]
        metrics = {
            "prompt/candidates": float(len(tried)),
            "prompt/out": float(sum(bool(candidate.why_out) for candidate in tried)),
            "prompt/critic_calls": float(search.critic_calls),
            "prompt/rollouts": float(search.rollouts),
        }
        if best and best[0].score is not None:
            metrics["prompt/best"] = best[0].score
        event = TrainingStep(
            event_id=f"{search.run_id}-step{search.round}",
            run_id=search.run_id,
            step=search.round,
            resource=search.resource,
            version_in=version_in,
            version_out=search.version,
            rollout_ids=[
                rollout_id for candidate in tried for rollout_id in search.rollout_ids(candidate, self._prompt)
            ],
            groups=len(tried),
            reward_mean=sum(scores) / len(scores) if scores else 0.0,
            offsets={str(partition): offset for partition, offset in self._reader.offsets.items()},
            metrics=metrics,
        )
        return self._record(TRAINING, search.run_id, event)

    def finished(self, search: Search) -> Outgoing:
        event = RunFinished(
            event_id=f"{search.run_id}-finished",
            run_id=search.run_id,
            step=search.round,
            resource=search.resource,
            version=search.version,
            reason=f"{search.round} rounds, {search.rollouts} rollouts, {search.critic_calls} calls of the critic",
        )
        return self._record(TRAINING, search.run_id, event)

    def _queued(self, search: Search, candidate: Candidate, pin: str, task: int, rollout_id: str) -> Outgoing:
        event = RolloutQueued.model_validate(
            {
                "event_id": f"{rollout_id}-queued",
                "rollout_id": rollout_id,
                "run_id": search.run_id,
                "task_id": f"task-{task}",
                "group_id": f"{search.run_id}-c{candidate.number}",
                "group_size": self._prompt.val_batch,
                "mode": "val",  # trainers pass over it
                "agent": self._prompt.agent,
                "input": task_input(self._tasks, task),
                "config": RolloutConfig(timeout_seconds=self._prompt.rollout_timeout_seconds),
                "metadata": {"candidate": str(candidate.number)},
                "resources_id": pin,
            }
        )
        return self._record(ROLLOUTS, rollout_id, event)

    def _record(self, topic: Topic, key: str, event: Any) -> Outgoing:
        kafka = self._settings.kafka
        return Outgoing(kafka.topic(topic), encode_key(key), encode(event, kafka.max_record_bytes))

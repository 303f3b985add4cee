"""The search for a better prompt template: rounds of critique, edit and trial, each step of it a transaction.

    beam ──► critic: what is wrong? ──► critic: a better one ──► candidate on `resources`, rollouts on `rollouts`
      ▲                                                                           │ agents, pinned to the candidate
      └── scores ◄── rewards on `trajectories` ◄──────────────────────────────────┘
             └─► a new version of the template on `resources`, where one is better than the one that is served

consumes: trajectories of its run, spans      produces: resources, rollouts, training, algorithm_state
waits for: the critic; rewards                unblocked by: its answer; the last reward, candidate_deadline_seconds

The contract. All that the search knows is one record of `algorithm_state` (search.py), written in every transaction.
1. InitProducerId: a predecessor of the same name can commit nothing any more. State and offsets are read.
2. A new search: one transaction with the state, the seed as the first candidate and as a version (whose writer the
   search is from now on), its rollouts, `run_started`, and the offsets from which rewards are read.
   Crash before the commit: as if it had never begun.
3. propose: the critic is asked for one edit.  Crash: it is asked again; these calls are on its bill, not in the budget.
   Where settings leave none (budgets made smaller at a restart), 4 has the state alone, and the round goes on.
4. One transaction with the state, the candidate, its rollouts.  Crash before: as 3. After: the next edit's turn comes.
5. evaluate: rewards are read until all are there.  Crash: they are read again, from the committed offsets.
6. One transaction with the state (scores, beam, next round), the step on `training`, the better version if there is
   one, and the offsets behind the rewards.  Crash before: as 5. After: the next round begins.
7. The last one of 4 and 6 has `run_finished`, too.

One writer of the template at a time: a version that somebody else announces ends the search (trainer/ownership.py).
Does not know what a template says, nor how agents use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx
from pydantic import ValidationError

from fulgurite.producers.resources import newest_version
from fulgurite.producers.service import run_service
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import PromptSettings, Settings
from fulgurite.schemas.topics import ALGORITHM_STATE, TRAJECTORIES
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.algorithms.chat import ChatModel
from fulgurite.streams.algorithms.memory import WHEN_GONE, Unreadable, remembered, still_there
from fulgurite.streams.algorithms.prompts.critic import Critic
from fulgurite.streams.algorithms.prompts.publishing import ALGORITHM, Publishing
from fulgurite.streams.algorithms.prompts.reading import results_of, span_ends, spans_of
from fulgurite.streams.algorithms.prompts.search import EXAMPLES_PER_SHOWN, KEPT, Candidate, Example, Search, as_reward
from fulgurite.streams.algorithms.transcript import shortened, texts_of
from fulgurite.streams.trainer.log import committed_run
from fulgurite.streams.trainer.ownership import Ownership
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.tasks import TaskFunction, load_tasks, task_input
from fulgurite.streams.transactions import Hook, Outgoing, Transactions, no_hook

logger = logging.getLogger(__name__)

EXAMPLE_CHARS = 2_000
"""Of an example's input and output each."""


def main(settings: Settings) -> int:
    """`fulgurite optimise-prompt`: exit code 0 when the search is over, or was asked to stop."""
    return run_service("optimise-prompt", settings.log, lambda stop: serve(settings, stop))


async def serve(settings: Settings, stop: asyncio.Event, hook: Hook = no_hook) -> None:
    """Until the search is over or `stop`; a stop leaves what a crash leaves. `hook` is told each step by name."""
    check(settings.prompt)
    searching = asyncio.create_task(_search(settings, hook))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({searching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not searching.done():
            logger.info("stopping; started again with the same prompt.run_id, the search goes on where it stood")
    finally:
        stopping.cancel()
        searching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await searching


def check(prompt: PromptSettings) -> None:
    """Raises SettingsError for what cannot be run."""
    for name in ("run_id", "tasks", "critic_model"):
        if not getattr(prompt, name):
            raise SettingsError(f"prompt.{name} is empty: it is required")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", prompt.run_id):
        raise SettingsError(f"prompt.run_id = {prompt.run_id!r}: at most 64 letters, digits, dots, dashes, underscores")
    if prompt.val_batch > prompt.max_rollouts:
        raise SettingsError(
            f"prompt.max_rollouts = {prompt.max_rollouts} is not enough for one candidate: prompt.val_batch = "
            f"{prompt.val_batch}"
        )


async def _search(settings: Settings, hook: Hook) -> None:
    prompt = settings.prompt
    tasks = load_tasks(prompt.tasks, "prompt.tasks")
    name = f"{settings.kafka.topic_prefix}prompt.{prompt.run_id}"
    transactions = Transactions(settings.kafka, transactional_id=name, group=name, hook=hook)
    reader = TrajectoryReader(settings.kafka, settings.kafka.topic(TRAJECTORIES), WHEN_GONE)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            model = ChatModel(
                client, prompt.critic_url, prompt.critic_model, prompt.critic_api_key, prompt.critic_timeout_seconds
            )
            critic = Critic(model, prompt)
            await transactions.start()  # 1.
            await reader.start()
            publishing = Publishing(settings, tasks, reader, transactions)
            optimiser = Optimiser(settings, tasks, critic, reader, publishing, hook)
            await optimiser.run(await _committed(transactions, reader))
    finally:
        await reader.close()
        await transactions.close()


async def _committed(transactions: Transactions, reader: TrajectoryReader) -> dict[int, int]:
    committed = await transactions.committed(reader.partitions)
    return {tp.partition: at.offset for tp, at in committed.items() if at is not None}


class Optimiser:
    """One search, from where it stands to its end."""

    def __init__(
        self,
        settings: Settings,
        tasks: TaskFunction,
        critic: Critic,
        reader: TrajectoryReader,
        publishing: Publishing,
        hook: Hook,
    ) -> None:
        self._settings = settings
        self._prompt = settings.prompt
        self._tasks = tasks
        self._critic = critic
        self._reader = reader
        self._publishing = publishing
        self._hook = hook
        self._ownership = Ownership(settings.kafka, settings.prompt.resource, settings.prompt.run_id)

    async def run(self, offsets: Mapping[int, int]) -> None:
        search = await self._restore()
        if search is None:
            search = await self._begin()
        else:
            await self._reader.seek(await still_there(self._reader, offsets))
            await self._ownership.check()
            logger.info("search %s goes on: round %d, %s", search.run_id, search.round, search.phase)
        self._hook("restored")
        while search.phase != "over":
            if search.phase == "propose":
                await self._propose(search)
            else:
                await self._evaluate(search)
        self._say(search)

    async def _restore(self) -> Search | None:
        found = (await remembered(self._settings.kafka, ALGORITHM)).get(self._prompt.run_id)
        if found is None:
            return None
        search = self._read(found)
        if change := search.change(self._prompt):
            raise SettingsError(
                f"{change}: candidates are compared on the same tasks. Set it back, or begin another search under a "
                "new prompt.run_id"
            )
        return search

    def _read(self, found: Any) -> Search:
        """Raises StartError: begun anew under the same name, the search would undo its own versions."""
        try:
            if not isinstance(found, Unreadable):
                return Search.model_validate(found)
            why = found.why
        except ValidationError as error:
            why = str(error.errors(include_url=False)[0]["msg"])
        raise StartError(
            f"what search {self._prompt.run_id} remembers cannot be read ({why}). Begin another one under a new "
            f"prompt.run_id, or this one anew: write a record without a value to "
            f"{self._settings.kafka.topic(ALGORITHM_STATE)}, key {ALGORITHM}/{self._prompt.run_id}"
        )

    async def _begin(self) -> Search:
        """2."""
        known = await committed_run(self._settings.kafka, self._prompt.run_id)
        if known is not None and known.resource != self._prompt.resource:
            raise SettingsError(
                f"prompt.run_id = {self._prompt.run_id}: a run of this name makes versions of {known.resource} "
                "already; give the search a name of its own"
            )
        newest = await newest_version(self._settings.kafka, self._prompt.resource)
        if newest is not None and newest.kind != "prompt_template":
            raise SettingsError(
                f"prompt.resource = {self._prompt.resource} is of kind {newest.kind}, no prompt template"
            )
        text = self._seed(newest.content if newest is not None else None)
        version = 1 + await self._ownership.take_over()
        await self._reader.seek_to_end()
        kept = {name: getattr(self._prompt, name) for name in KEPT}
        search = Search(run_id=self._prompt.run_id, version=version, **kept)
        if fault := search.fault(text, self._prompt) or self._publishing.room_fault(search, text):
            raise SettingsError(f"the seed of prompt template {self._prompt.resource} cannot be used: {fault}")
        search.spans_from = await span_ends(self._settings.kafka)
        seed = search.first(text, _clock(), self._prompt)
        announced = [self._publishing.started(search), self._publishing.version(search, seed)]
        await self._publishing.commit(search, [*announced, *self._publishing.candidate(search, seed)])
        logger.info("search %s begins with %d characters", search.run_id, len(text))
        return search

    def _seed(self, newest: str | None) -> str:
        if self._prompt.seed is not None:
            try:
                return self._prompt.seed.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"prompt.seed = {self._prompt.seed}: {error}") from None
        if newest is None:
            raise SettingsError(
                f"prompt.seed is empty, and there is no prompt template {self._prompt.resource} yet: name a file with "
                "the template to begin with"
            )
        return newest

    async def _propose(self, search: Search) -> None:
        """3. and 4., for one edit."""
        found = search.next_parent(self._prompt)
        if found is None:  # a budget is smaller than when the round began
            search.end_proposing()
            records = [self._publishing.finished(search)] if search.phase == "over" else []
            await self._publishing.commit(search, records)
            return
        parent, branch = found
        text = await self._critic.edit(parent, branch, search.round)  # 3.
        self._hook("asked")
        if text is not None and (
            fault := search.fault(text, self._prompt) or self._publishing.room_fault(search, text)
        ):
            logger.info("an edit of candidate %d is thrown away: %s", parent.number, fault)
            text = None
        candidate = search.proposed(parent, text, _clock(), self._prompt)
        records = self._publishing.candidate(search, candidate) if candidate is not None else []
        records += [self._publishing.finished(search)] if search.phase == "over" else []
        await self._publishing.commit(search, records)  # 4.
        self._hook("proposed")

    async def _evaluate(self, search: Search) -> None:
        """5. and 6."""
        tried = search.waiting()
        wanted = [rollout_id for candidate in tried for rollout_id in search.rollout_ids(candidate, self._prompt)]
        results = await results_of(self._reader, search.run_id, wanted, self._prompt.candidate_deadline_seconds)  # 5.
        self._hook("read")
        rewards = {
            candidate.number: [
                result.reward if (result := results.get(rollout_id)) else None
                for rollout_id in search.rollout_ids(candidate, self._prompt)
            ]
            for candidate in tried
        }
        examples = await self._examples(search, tried, results)
        version_in = search.version
        search.spans_from = await span_ends(self._settings.kafka)
        better = search.scored(rewards, examples, self._prompt)
        records: list[Outgoing] = [self._publishing.round_over(search, version_in, tried)]
        if better is not None:
            await self._ownership.check()
            records.append(self._publishing.version(search, better))
        records += [self._publishing.finished(search)] if search.phase == "over" else []
        await self._publishing.commit(search, records)  # 6.
        self._hook("scored")
        self._report(search, tried)

    async def _examples(
        self, search: Search, tried: list[Candidate], results: Mapping[str, Trajectory]
    ) -> dict[int, list[Example]]:
        """The worst rollouts of each candidate, as the critic will see them."""
        attempts = {rollout_id: result.attempt_id for rollout_id, result in results.items()}
        spans = await spans_of(self._settings.kafka, search.spans_from, attempts, search.run_id)
        found: dict[int, list[Example]] = {}
        for candidate in tried:
            examples: list[Example] = []
            for task, rollout_id in enumerate(search.rollout_ids(candidate, self._prompt)):
                result = results.get(rollout_id)
                reward = as_reward(result.reward) if result is not None else None
                if result is None or reward is None:
                    continue
                given = json.dumps(task_input(self._tasks, task), ensure_ascii=False)
                output = texts_of(spans.get(rollout_id, []))["output"] or result.error
                examples.append(
                    Example(
                        input=shortened(given, EXAMPLE_CHARS),
                        output=shortened(output, EXAMPLE_CHARS),
                        reward=reward,
                    )
                )
            examples.sort(key=lambda example: example.reward)
            found[candidate.number] = examples[: EXAMPLES_PER_SHOWN * self._prompt.gradient_batch]
        return found

    def _report(self, search: Search, tried: list[Candidate]) -> None:
        best = search.ranked()
        out = [f"{candidate.number} ({candidate.why_out})" for candidate in tried if candidate.why_out]
        logger.info(
            "round %d: %d candidates tried, best %s, version %d; %d rollouts, %d calls of the critic%s",
            search.round - 1, len(tried), f"{best[0].score:.4g}" if best else "none", search.version, search.rollouts,
            search.critic_calls, f"; out: {', '.join(out)}" if out else "",
        )  # fmt: skip

    def _say(self, search: Search) -> None:
        best = search.ranked()
        logger.info(
            "search %s is over: version %d of %s, score %s; see: fulgurite sql \"SELECT version, content "
            "FROM resources WHERE resource = '%s' ORDER BY version\"",
            search.run_id, search.version, search.resource, f"{best[0].score:.4g}" if best else "none", search.resource,
        )  # fmt: skip


def _clock() -> int:
    """Versions of candidates: their names are used again by later searches, and a resource's versions only grow."""
    return time.time_ns() // 1_000_000

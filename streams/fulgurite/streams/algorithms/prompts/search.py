"""The search's state: which templates were tried, how good they are, which to go on from, what is left to spend. Pure.

    round 0:  the seed is tried
    round r:  of each of the beam_width best, branch_factor edits are asked for (propose), then tried (evaluate)

Promises: never more than max_rollouts rollouts or max_critic_calls calls; a template is tried once; candidates are
compared on the same tasks. The score is the mean reward over all tasks; a rollout without a reward counts as the lowest
one seen in the search so far, of any candidate, so that it never pays to crash and no scale of rewards is presumed.
When a lower one is seen, earlier scores fall accordingly. A candidate of which fewer than min_share have one is out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from fulgurite.producers.prompts import PromptTemplate
from fulgurite.schemas.rewards import MAX_REWARD
from fulgurite.schemas.settings import PromptSettings

CALLS_PER_EDIT = 2
"""A critique and an edit."""

EXAMPLES_PER_SHOWN = 2
"""Rollouts remembered of a candidate, for each that the critic is shown: its edits see different ones."""


KEPT = ("resource", "tasks", "agent", "val_batch")
"""Settings that stay as a search began with: with others its candidates could not be compared."""


class Example(BaseModel):
    """A rollout, for the critic."""

    input: str
    output: str
    reward: float


class Candidate(BaseModel):
    """A template."""

    number: int
    text: str
    version: int
    """Of the resource under which it is tried."""
    round: int = 0
    parent: int | None = None
    score: float | None = None
    rewarded: int = 0
    """Rollouts that have a reward, …"""
    missing: int = 0
    """… and those that have none."""
    total: float | None = None
    """Sum of the rewards; None where it was not tried, or is out."""
    why_out: str = ""
    """Why it is none any more; empty while it is one."""
    examples: list[Example] = Field(default_factory=list[Example])
    """Its worst rollouts; only of the beam."""


def as_reward(value: float | None) -> float | None:
    """None for what is beyond any reward: it counts as missing, as it would outweigh all others, or not add up."""
    return value if value is not None and abs(value) <= MAX_REWARD else None


class Search(BaseModel):
    """All that is remembered."""

    run_id: str
    resource: str
    tasks: str | None = None
    """Of the settings it began with, as the two below; None where it was remembered without."""
    agent: str | None = None
    val_batch: int | None = None
    phase: Literal["evaluate", "propose", "over"] = "evaluate"
    round: int = 0
    candidates: list[Candidate] = Field(default_factory=list[Candidate])
    beam: list[int] = Field(default_factory=list[int])
    tried: int = 0
    """Edits asked for in this round."""
    rollouts: int = 0
    critic_calls: int = 0
    version: int = 0
    """The newest version of the resource that this search knows of, and which candidate it is."""
    published: int = 0
    lowest: float | None = None
    """Reward of any rollout so far."""
    spans_from: dict[int, int] = Field(default_factory=dict[int, int])
    """By partition: before it lies no span of the candidates being tried."""

    def change(self, settings: PromptSettings) -> str:
        """Which of the settings is another one than the search began with; empty where none is."""
        for name in KEPT:
            began, now = getattr(self, name), getattr(settings, name)
            if began not in (None, now):
                return f"prompt.{name} = {now}, but search {self.run_id} began with {began}"
        return ""

    def waiting(self) -> list[Candidate]:
        """Candidates being tried."""
        return [candidate for candidate in self.candidates if candidate.score is None and not candidate.why_out]

    def rollout_ids(self, candidate: Candidate, settings: PromptSettings) -> list[str]:
        """By task."""
        return [f"{self.run_id}-c{candidate.number}-t{task}" for task in range(settings.val_batch)]

    def first(self, text: str, version: int, settings: PromptSettings) -> Candidate:
        """The seed."""
        return self._add(Candidate(number=0, text=text, version=version), settings)

    def next_parent(self, settings: PromptSettings) -> tuple[Candidate, int] | None:
        """The candidate to be edited next and how many edits of it were asked for; None where this round has had its
        edits, or a budget is used up."""
        if self.tried >= len(self.beam) * settings.branch_factor:
            return None
        if self.critic_calls + CALLS_PER_EDIT > settings.max_critic_calls:
            return None
        if self.rollouts + settings.val_batch > settings.max_rollouts:
            return None
        place, branch = divmod(self.tried, settings.branch_factor)
        return self.candidates[self.beam[place]], branch

    def proposed(self, parent: Candidate, text: str | None, version: int, settings: PromptSettings) -> Candidate | None:
        """Takes in an edit (None: the critic gave none); the candidate, if it is one."""
        self.tried += 1
        self.critic_calls += CALLS_PER_EDIT
        made = None
        if text is not None and not self.fault(text, settings):
            number = len(self.candidates)
            made = self._add(
                Candidate(number=number, text=text, version=version, round=self.round, parent=parent.number), settings
            )
        if self.next_parent(settings) is None:
            self.end_proposing()
        return made

    def end_proposing(self) -> None:
        """This round has no more edits: what there is is tried."""
        self.phase = "evaluate" if self.waiting() else "over"

    def fault(self, text: str, settings: PromptSettings) -> str:
        """Why an edit is thrown away; empty where it is not."""
        if not text.strip():
            return "it is empty"
        if len(text) > settings.max_template_chars:
            return f"it has {len(text)} characters; prompt.max_template_chars = {settings.max_template_chars}"
        if missing := [part for part in self._needed(settings) if part not in text]:
            return f"it lacks {', '.join(missing)}"
        if any(candidate.text == text for candidate in self.candidates):
            return "it was tried already"
        return ""

    def _needed(self, settings: PromptSettings) -> Sequence[str]:
        """What a template must have in it: where nothing is asked for, all places of the seed."""
        seed = self.candidates[0].text if self.candidates else ""
        return settings.must_contain or PromptTemplate(self.resource, 0, seed).places

    def scored(
        self,
        rewards: Mapping[int, Sequence[float | None]],
        examples: Mapping[int, Sequence[Example]],
        settings: PromptSettings,
    ) -> Candidate | None:
        """Takes in the rewards of the candidates being tried, by number; chooses the beam and begins the next round.

        Gives the candidate to be published, None where none is better than the one that is.
        """
        known_of = {
            number: [reward for each in given if (reward := as_reward(each)) is not None]
            for number, given in rewards.items()
        }
        seen = [reward for known in known_of.values() for reward in known]
        self.lowest = min([*seen, *([] if self.lowest is None else [self.lowest])], default=None)
        for candidate in self.waiting():
            known = known_of[candidate.number]
            candidate.rewarded, candidate.missing = len(known), settings.val_batch - len(known)
            if len(known) < settings.min_share * settings.val_batch:
                candidate.why_out = f"{len(known)} of {settings.val_batch} rollouts have a reward"
                continue
            candidate.total = math.fsum(known)
            candidate.examples = list(examples.get(candidate.number, ()))
        for candidate in self.candidates:
            if candidate.total is not None:
                filled = candidate.total + candidate.missing * (self.lowest or 0.0)
                candidate.score = filled / (candidate.rewarded + candidate.missing)
        ranked = self.ranked()
        self.beam = [candidate.number for candidate in ranked[: settings.beam_width]]
        for candidate in self.candidates:
            if candidate.number not in self.beam:
                candidate.examples = []
        self.round, self.tried = self.round + 1, 0
        going_on = bool(self.beam) and self.round <= settings.rounds and self.next_parent(settings) is not None
        self.phase = "propose" if going_on else "over"
        return self._better(ranked)

    def keep_examples(self, max_bytes: int) -> None:
        """As many as there is room for: whose take the most loses the best of them, again and again."""
        sizes = {one.number: [len(e.model_dump_json().encode()) for e in one.examples] for one in self.candidates}
        while sum(map(sum, sizes.values())) > max_bytes:
            most = max(sizes, key=lambda number: sum(sizes[number]))
            sizes[most].pop()
            self.candidates[most].examples.pop()

    def ranked(self) -> list[Candidate]:
        """The best first; of equals the one that was tried first."""
        tried = [candidate for candidate in self.candidates if candidate.score is not None]
        return sorted(tried, key=lambda candidate: (-(candidate.score or 0.0), candidate.number))

    def _better(self, ranked: Sequence[Candidate]) -> Candidate | None:
        if not ranked or ranked[0].number == self.published:
            return None
        now = self.candidates[self.published].score
        if now is not None and (ranked[0].score or 0.0) <= now:
            return None
        self.published = ranked[0].number
        self.version += 1
        return ranked[0]

    def _add(self, candidate: Candidate, settings: PromptSettings) -> Candidate:
        self.candidates.append(candidate)
        self.rollouts += settings.val_batch
        return candidate

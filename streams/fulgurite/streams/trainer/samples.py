"""From trajectories to what the learner reads: usable or not and why, advantages, per-token versions. Pure, no torch.

Masks say by position which tokens were sampled. Nothing here compares a token with a padding id: a policy may sample
it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.objectives.advantages import ESTIMATORS, has_signal
from fulgurite.streams.objectives.rewards import overlong_penalty
from fulgurite.streams.trainer.imitation import NOT_CHOSEN, chosen, needs_signal
from fulgurite.streams.trainer.objective import recipe_of
from fulgurite.streams.trainer.windows import FILLED, Member, Window

UNKNOWN_VERSION = -1

ADAPTER_CONFIG: Final = "adapter_config.json"
"""In the weights of a version that is a LoRA adapter: servers load it beside the model it is for."""

KNOWN_PARTIAL = ("no_reward", "no_calls")
"""Reasons of the assembler that say enough by themselves; others get a prefix, since `deadline` exists here too."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a sequence must fit into."""

    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of a rollout with the rollout's advantage. All lists have the sequence's length T."""

    rollout_id: str
    token_ids: list[int]
    loss_mask: list[int]
    behaviour_logprobs: list[float]
    versions: list[int]
    """[T] the version that sampled the token; UNKNOWN_VERSION where it was given."""
    advantage: float


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """A window, ready for the learner, with what its record tells."""

    samples: list[Sample]
    rollout_ids: list[str]
    dropped: list[DroppedRollout]
    rewards: list[float]
    """Of every survivor of the window, also of groups without signal."""
    penalties: list[float]
    """What was added to each of them for its length, before it became an advantage."""
    advantages: list[float]
    """One per rollout trained on."""
    groups: int
    groups_without_signal: int
    again: list[str] = field(default_factory=list[str])
    """Of rollouts trained on those that an earlier window had, too."""

    def apart(self, again: Collection[str]) -> TrainingSet:
        """The same with rollouts of earlier windows listed apart: the ledger has named them."""
        return replace(
            self,
            rollout_ids=[rollout_id for rollout_id in self.rollout_ids if rollout_id not in again],
            dropped=[each for each in self.dropped if each.rollout_id not in again],
            again=[rollout_id for rollout_id in self.rollout_ids if rollout_id in again],
        )

    def skipped(self, reason: str) -> TrainingSet:
        """The same window, not trained on after all: its rollouts are dropped with this reason."""
        dropped = [DroppedRollout(rollout_id=rollout_id, reason=reason[:512]) for rollout_id in self.rollout_ids]
        return replace(self, samples=[], rollout_ids=[], dropped=[*self.dropped, *dropped], again=[])


def read_limits(model: Path) -> ModelLimits:
    """From a Hugging Face folder's config.json, of an adapter's folder from its base's. Raises SettingsError where it
    is no such folder."""
    path = model / ADAPTER_CONFIG
    try:
        base = Path(json.loads(path.read_text())["base_model_name_or_path"]) if path.is_file() else model
        path = base / "config.json"
        config = json.loads(path.read_text())
        inner = config.get("text_config", config)
        return ModelLimits(int(inner["vocab_size"]), int(inner["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SettingsError(f"trainer.model: {model} is no model folder: {path}: {error!r}") from None


def member_of(
    trajectory: Trajectory, resource: str, limits: ModelLimits, agents: Sequence[str] = ()
) -> tuple[Member, str]:
    """The trajectory as a member of its group, and what exactly is wrong with its tokens (empty when nothing is)."""
    sequences = trained_sequences(trajectory, resource, agents)
    fault = next(filter(None, (token_fault(sequence, limits) for sequence in sequences)), "")
    reason = _reason(trajectory, sequences, fault)
    if reason:
        # Without data its tokens need not be kept.
        return Member(trajectory.model_copy(update={"sequences": []}), reason), fault
    oldest = min(part.version for sequence in sequences for part in sequence.weight_versions)
    return Member(trajectory, "", oldest), ""


def trained_sequences(trajectory: Trajectory, resource: str, agents: Sequence[str] = ()) -> list[TokenSequence]:
    """The sequences this resource's policy sampled tokens of, for these agents (empty: all); other policies and agents
    have trainers of their own."""
    return [
        s
        for s in trajectory.sequences
        if s.resource in ("", resource) and (not agents or s.agent in agents) and any(s.loss_mask)
    ]


def of_others(sample: Sample) -> Sample:
    """A sample of another policy than the one that is trained: versions of that one say nothing about ours."""
    return replace(sample, versions=[UNKNOWN_VERSION] * len(sample.versions))


def training_set(window: Window, settings: TrainerSettings, resource: str = "") -> TrainingSet:
    """Advantages over the whole window, as the settings say; then groups without signal are dropped as `zero_variance`,
    or kept, and for imitation all but the best of each are dropped: their rewards count either way. Whether a group has
    a signal its rewards say, not what length costs.

    `resource` is the policy that sampled, where it is not the one that is trained."""
    sampler, agents = resource or settings.resource, settings.agents
    trained = [[trained_sequences(m.trajectory, sampler, agents) for m in group] for group in window.groups]
    tokens = [[sum(sum(s.loss_mask) for s in sequences) for sequences in group] for group in trained]
    rewards = [[_reward(member.trajectory) for member in group] for group in window.groups]
    penalties = [[_penalty(count, settings) for count in group] for group in tokens]
    shaped = [
        [reward + penalty for reward, penalty in zip(*both, strict=True)]
        for both in zip(rewards, penalties, strict=True)
    ]
    advantages = ESTIMATORS[recipe_of(settings).advantage](shaped, tokens)
    samples: list[Sample] = []
    rollout_ids: list[str] = []
    dropped = list(window.dropped)
    trained_advantages: list[float] = []
    silent = [not has_signal(group) for group in rewards]
    for group, sequences, numbers, is_silent in zip(window.groups, trained, advantages, silent, strict=True):
        if is_silent and needs_signal(settings):
            named = [member for member in group if member.reason != FILLED]
            dropped += [DroppedRollout(rollout_id=m.trajectory.rollout_id, reason="zero_variance") for m in named]
            continue
        wanted = chosen([_reward(member.trajectory) for member in group], settings)
        for member, own, advantage, is_wanted in zip(group, sequences, numbers, wanted, strict=True):
            if member.reason == FILLED:
                continue  # dropped already: it counted in the comparison only
            rollout_id = member.trajectory.rollout_id
            if not is_wanted:
                dropped.append(DroppedRollout(rollout_id=rollout_id, reason=NOT_CHOSEN))
                continue
            rollout_ids.append(rollout_id)
            trained_advantages.append(advantage)
            samples += [_sample(rollout_id, sequence, advantage) for sequence in own]
    return TrainingSet(
        samples=samples,
        rollout_ids=rollout_ids,
        dropped=dropped,
        rewards=[reward for group in rewards for reward in group],
        penalties=[penalty for group in penalties for penalty in group],
        advantages=trained_advantages,
        groups=len(window.groups),
        groups_without_signal=sum(silent),
    )


def _reason(trajectory: Trajectory, sequences: list[TokenSequence], fault: str) -> str:
    if trajectory.status != "succeeded":
        return trajectory.status
    if trajectory.partial:
        return trajectory.partial if trajectory.partial in KNOWN_PARTIAL else f"partial:{trajectory.partial}"[:512]
    if trajectory.reward is None:
        return "no_reward"
    if not sequences:
        return "no_calls"
    if fault:
        return "bad_tokens"
    # A token of unknown age cannot be held to the bound on staleness.
    if any(UNKNOWN_VERSION in _sampled_versions(sequence) for sequence in sequences):
        return "no_version"
    return ""


def token_fault(sequence: TokenSequence, limits: ModelLimits) -> str:
    if len(sequence.token_ids) > limits.max_positions:
        return f"{len(sequence.token_ids)} tokens; the model has {limits.max_positions} positions"
    worst = max(sequence.token_ids, default=0)
    if worst >= limits.vocab_size:
        return f"token id {worst}; the model's vocabulary has {limits.vocab_size}"
    if sequence.loss_mask[0]:
        return "the first token is marked as sampled, but nothing comes before it that it could be predicted from"
    return ""


def _sampled_versions(sequence: TokenSequence) -> list[int]:
    versions = token_versions(sequence)
    return [version for version, sampled in zip(versions, sequence.loss_mask, strict=True) if sampled]


def token_versions(sequence: TokenSequence) -> list[int]:
    """[T] version per token, UNKNOWN_VERSION where no span says one."""
    versions = [UNKNOWN_VERSION] * len(sequence.token_ids)
    for part in sequence.weight_versions:
        versions[part.start : part.end] = [part.version] * (part.end - part.start)
    return versions


def _sample(rollout_id: str, sequence: TokenSequence, advantage: float) -> Sample:
    return Sample(
        rollout_id, sequence.token_ids, sequence.loss_mask, sequence.logprobs, token_versions(sequence), advantage
    )


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.reward is not None, "a survivor has a reward: member_of saw to it"
    return trajectory.reward


def _penalty(tokens: int, settings: TrainerSettings) -> float:
    if not settings.overlong_buffer_tokens:
        return 0.0
    assert settings.overlong_max_tokens is not None, "make_plan refuses a buffer without it"
    return overlong_penalty(
        tokens,
        max_length=settings.overlong_max_tokens,
        buffer=settings.overlong_buffer_tokens,
        factor=settings.overlong_penalty,
    )

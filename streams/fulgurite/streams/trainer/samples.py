"""From trajectories to what the learner reads: usable or not and why, advantages, per-token versions. Pure, no torch.

Masks say by position which tokens were sampled. Nothing here compares a token with a padding id: a policy may sample
it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.objectives.advantages import group_advantages, has_signal
from fulgurite.streams.trainer.windows import Member, Window

UNKNOWN_VERSION = -1

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
    advantages: list[float]
    """One per rollout trained on."""
    groups: int
    groups_without_signal: int


def read_limits(model: Path) -> ModelLimits:
    """From a Hugging Face folder's config.json. Raises SettingsError where it is no such folder."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_text())
        inner = config.get("text_config", config)
        return ModelLimits(int(inner["vocab_size"]), int(inner["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SettingsError(f"trainer.model: {model} is no model folder: {path}: {error!r}") from None


def member_of(trajectory: Trajectory, resource: str, limits: ModelLimits) -> tuple[Member, str]:
    """The trajectory as a member of its group, and what exactly is wrong with its tokens (empty when nothing is)."""
    sequences = trained_sequences(trajectory, resource)
    fault = next(filter(None, (_token_fault(sequence, limits) for sequence in sequences)), "")
    reason = _reason(trajectory, sequences, fault)
    if reason:
        # Without data its tokens need not be kept.
        return Member(trajectory.model_copy(update={"sequences": []}), reason), fault
    oldest = min(part.version for sequence in sequences for part in sequence.weight_versions)
    return Member(trajectory, "", oldest), ""


def trained_sequences(trajectory: Trajectory, resource: str) -> list[TokenSequence]:
    """The sequences this resource's policy sampled tokens of; other policies have trainers of their own."""
    return [s for s in trajectory.sequences if s.resource in ("", resource) and any(s.loss_mask)]


def training_set(window: Window, resource: str) -> TrainingSet:
    """Advantages per group; groups without signal are dropped as `zero_variance`, their rewards still count."""
    samples: list[Sample] = []
    rollout_ids: list[str] = []
    dropped = list(window.dropped)
    rewards: list[float] = []
    trained_advantages: list[float] = []
    silent = 0
    for group in window.groups:
        group_rewards = [_reward(member.trajectory) for member in group]
        rewards += group_rewards
        if not has_signal(group_rewards):
            silent += 1
            dropped += [DroppedRollout(rollout_id=m.trajectory.rollout_id, reason="zero_variance") for m in group]
            continue
        for member, advantage in zip(group, group_advantages(group_rewards), strict=True):
            rollout_ids.append(member.trajectory.rollout_id)
            trained_advantages.append(advantage)
            samples += [
                _sample(member.trajectory.rollout_id, sequence, advantage)
                for sequence in trained_sequences(member.trajectory, resource)
            ]
    return TrainingSet(samples, rollout_ids, dropped, rewards, trained_advantages, len(window.groups), silent)


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


def _token_fault(sequence: TokenSequence, limits: ModelLimits) -> str:
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

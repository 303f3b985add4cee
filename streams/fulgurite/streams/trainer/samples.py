"""From trajectories to what the learner reads: usable or not and why, advantages, per-token versions. Pure, no torch.

Masks say by position which tokens were sampled. Nothing here compares a token with a padding id: a policy may sample
it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.rewards import MAX_REWARD
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.training import DroppedRollout
from fulgurite.schemas.trajectories import LeftOutCall, TokenSequence, Trajectory
from fulgurite.streams.objectives.advantages import OVER_WINDOW
from fulgurite.streams.objectives.rewards import overlong_penalty
from fulgurite.streams.trainer.credit import calls_of, credited, teaches
from fulgurite.streams.trainer.imitation import NOT_CHOSEN, chosen, needs_signal
from fulgurite.streams.trainer.objective import recipe_of
from fulgurite.streams.trainer.sample import Call, Sample
from fulgurite.streams.trainer.windows import FILLED, Member, Window

UNKNOWN_VERSION = -1

ADAPTER_CONFIG: Final = "adapter_config.json"
"""In the weights of a version that is a LoRA adapter: servers load it beside the model it is for."""

KNOWN_PARTIAL = ("no_reward", "no_calls")
"""Reasons of the assembler that say enough by themselves; others get a prefix, since `deadline` exists here too."""

MAX_LOGPROB: Final = 1e-3
"""Of a sampled token: 0, and what a sampler rounds."""
MIN_LOGPROB: Final = -1e4
"""No sampler draws such a token; the least that some servers write is -9999. Below, float32's exponentials end."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a sequence must fit into."""

    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """A window, ready for the learner, with what its record tells."""

    samples: list[Sample]
    rollout_ids: list[str]
    dropped: list[DroppedRollout]
    rewards: list[float]
    """Of every survivor of the window, also of groups without signal; not of members filled in."""
    penalties: list[float]
    """What was added to each of them for its length, before it became an advantage."""
    groups: int
    groups_without_signal: int
    again: list[str] = field(default_factory=list[str])
    """Of rollouts trained on those that an earlier window had, too."""
    compared: list[Sample] = field(default_factory=list[Sample])
    """Not trained on; advantages of the others that are made anew (trainer.kl_in_reward) depend on them."""

    def apart(self, again: Collection[str]) -> TrainingSet:
        """The same with rollouts of earlier windows listed apart: the ledger has named them."""
        return replace(
            self,
            rollout_ids=[rollout_id for rollout_id in self.rollout_ids if rollout_id not in again],
            dropped=[each for each in self.dropped if each.rollout_id not in again],
            again=[rollout_id for rollout_id in self.rollout_ids if rollout_id in again],
        )

    def without(self, reasons: Mapping[str, str]) -> TrainingSet:
        """The same window without rollouts that were not trained on after all: dropped, each with its reason. Those of
        earlier windows the ledger has named: they are only taken from `again`."""
        dropped = [
            DroppedRollout(rollout_id=rollout_id, reason=reasons[rollout_id][:512])
            for rollout_id in self.rollout_ids
            if rollout_id in reasons
        ]
        return replace(
            self,
            samples=[sample for sample in self.samples if sample.rollout_id not in reasons],
            rollout_ids=[rollout_id for rollout_id in self.rollout_ids if rollout_id not in reasons],
            dropped=[*self.dropped, *dropped],
            again=[rollout_id for rollout_id in self.again if rollout_id not in reasons],
        )


def read_limits(model: Path) -> ModelLimits:
    """From a Hugging Face folder's config.json, as transformers reads it: with its classes' names and defaults. Raises
    SettingsError where it is no such folder."""
    # Here and not at the top: they bring torch, and nothing else here needs it.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = model / "config.json"
    try:
        json.loads(path.read_text())  # else transformers would look for the model elsewhere
        whole = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        config: Any = whole.get_text_config()
        vocab_size, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise SettingsError(f"trainer.model: {model} is no model folder: {path}: {error!r}") from None
    if not isinstance(vocab_size, int) or not isinstance(positions, int):
        raise SettingsError(
            f"trainer.model: {path} says {vocab_size} tokens and {positions} positions (vocab_size, "
            "max_position_embeddings): models without a bound on either cannot be trained here"
        )
    return ModelLimits(vocab_size, min([positions, *_windows(config)]))


def _windows(config: Any) -> list[int]:
    """How many tokens back those layers look that do not look all the way. A longer sequence cannot be trained on:
    packed attention is full attention."""
    kinds = getattr(config, "layer_types", None)
    found: list[int] = []
    for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        is_used = kinds is None or kind in kinds
        if is_used and getattr(config, f"use_{name}", True) and (window := getattr(config, name, None)):
            found.append(int(window))
    return found


def member_of(
    trajectory: Trajectory, resource: str, limits: ModelLimits, agents: Sequence[str] = ()
) -> tuple[Member, str]:
    """The trajectory as a member of its group, and what exactly is wrong with its tokens (empty when nothing is)."""
    sequences = trained_sequences(trajectory, resource, agents)
    fault = next(filter(None, (token_fault(sequence, limits) for sequence in sequences)), "")
    reason = _reason(trajectory, own_partial(trajectory, resource, agents), sequences, fault)
    if not reason and (fault := reward_fault(trajectory)):
        reason = "bad_reward"
    if reason == "no_calls" and (others := _of_other_policies(trajectory, resource)):
        reason, fault = (
            "wrong_model",
            f"its tokens were sampled by {', '.join(others)}; this run trains on {resource}'s",
        )
    if reason:
        # Without data its tokens need not be kept; nor may a reward that is none be filled in.
        reward = None if reward_fault(trajectory) else trajectory.reward
        return Member(trajectory.model_copy(update={"sequences": [], "reward": reward}), reason), fault
    versions = [part.version for sequence in sequences for part in sequence.weight_versions]
    return Member(trajectory, "", min(versions), max(versions)), ""


def trained_sequences(trajectory: Trajectory, resource: str, agents: Sequence[str] = ()) -> list[TokenSequence]:
    """The sequences this resource's policy sampled tokens of, for these agents (empty: all); other policies and agents
    have trainers of their own."""
    return [s for s in trajectory.sequences if _is_trained(s, resource, agents) and any(s.loss_mask)]


def own_partial(trajectory: Trajectory, resource: str, agents: Sequence[str] = ()) -> str:
    """The words of `partial` but those that are about calls of other policies and agents alone."""
    named = {each.reason for each in trajectory.left_out}
    own = {each.reason for each in trajectory.left_out if _is_trained(each, resource, agents)}
    return ",".join(word for word in trajectory.partial.split(",") if word not in named - own)


def _is_trained(calls: TokenSequence | LeftOutCall, resource: str, agents: Sequence[str]) -> bool:
    return calls.resource in ("", resource) and (not agents or calls.agent in agents)


def _of_other_policies(trajectory: Trajectory, resource: str) -> list[str]:
    """Whose tokens it has; nobody's where this policy sampled some, for whichever agent."""
    found = {sequence.resource for sequence in trajectory.sequences if any(sequence.loss_mask)}
    return [] if found & {"", resource} else sorted(found)


def of_others(sample: Sample) -> Sample:
    """A sample of another policy than the one that is trained: versions of that one say nothing about ours."""
    return replace(sample, versions=[UNKNOWN_VERSION] * len(sample.versions))


def of_same_weights(sample: Sample, since: int, version: int) -> Sample:
    """A sample whose tokens of the versions since that one, which all have the weights of `version`, are its."""
    versions = [version if since <= each <= version else each for each in sample.versions]
    return replace(sample, versions=versions)


def training_set(window: Window, settings: TrainerSettings, resource: str = "") -> TrainingSet:
    """Advantages over the whole window, as the settings say; then groups without signal are dropped as `zero_variance`,
    or kept, and for imitation all but the best of each are dropped: their rewards count either way. Whether a group has
    a signal its rewards say, not what length costs.

    `resource` is the policy that sampled, where it is not the one that is trained."""
    sampler = resource or settings.resource
    members = [_Member.of(m, number, settings, sampler) for number, group in enumerate(window.groups) for m in group]
    groups = [[each for each in members if each.group == number] for number in range(len(window.groups))]
    silent = [not teaches([each.calls for each in group], settings) for group in groups]
    samples = credited([sample for each in members for sample in each.samples()], settings)
    dropped = list(window.dropped)
    rollout_ids: list[str] = []
    for group, is_silent in zip(groups, silent, strict=True):
        useless = is_silent and needs_signal(settings)
        for each, is_wanted in zip(group, chosen([each.reward for each in group], settings), strict=True):
            if each.is_filled:
                continue  # dropped already: it counted in the comparison only
            if not useless and is_wanted:
                rollout_ids.append(each.rollout_id)
            else:
                reason = "zero_variance" if useless else NOT_CHOSEN
                dropped.append(DroppedRollout(rollout_id=each.rollout_id, reason=reason))
    trained = frozenset(rollout_ids)
    is_anew = settings.kl_in_reward and recipe_of(settings).advantage in OVER_WINDOW
    compared = [sample for sample in samples if sample.rollout_id not in trained] if is_anew else []
    samples = [sample for sample in samples if sample.rollout_id in trained]
    return TrainingSet(
        samples=samples,
        rollout_ids=rollout_ids,
        dropped=dropped,
        rewards=[each.reward for each in members if not each.is_filled],
        penalties=[each.penalty for each in members if not each.is_filled],
        groups=len(window.groups),
        groups_without_signal=sum(silent),
        compared=compared,
    )


@dataclass(frozen=True, slots=True)
class _Member:
    """A survivor's trained sequences, with what each of their calls earned."""

    rollout_id: str
    group: int
    sequences: list[TokenSequence]
    by_sequence: list[tuple[Call, ...]]
    reward: float
    penalty: float
    is_filled: bool

    @staticmethod
    def of(member: Member, group: int, settings: TrainerSettings, sampler: str) -> _Member:
        trajectory = member.trajectory
        reward = _reward(trajectory)
        if member.reason == FILLED:
            nothing = [(Call(0, 0, 0, reward),)]
            return _Member(trajectory.rollout_id, group, [], nothing, reward, 0.0, is_filled=True)
        sequences = trained_sequences(trajectory, sampler, settings.agents)
        penalty = _penalty(sum(sum(s.loss_mask) for s in sequences), settings)
        calls = calls_of(trajectory, sequences, reward, settings)
        return _Member(trajectory.rollout_id, group, sequences, calls, reward, penalty, is_filled=False)

    @property
    def calls(self) -> list[Call]:
        return [call for calls in self.by_sequence for call in calls]

    def samples(self) -> list[Sample]:
        """Without advantages; the penalty for length is the last call's. One without tokens where it is filled in."""
        if self.is_filled:
            return [Sample(self.rollout_id, [], [], [], [], 0.0, self.group, self.by_sequence[0])]
        last = max(call.number for call in self.calls)
        return [
            Sample(
                self.rollout_id,
                sequence.token_ids,
                sequence.loss_mask,
                sequence.logprobs,
                token_versions(sequence),
                0.0,
                self.group,
                tuple(replace(c, reward=c.reward + self.penalty) if c.number == last else c for c in calls),
            )
            for sequence, calls in zip(self.sequences, self.by_sequence, strict=True)
        ]


def _reason(trajectory: Trajectory, partial: str, sequences: list[TokenSequence], fault: str) -> str:
    if trajectory.status != "succeeded":
        return trajectory.status
    if partial:
        return partial if partial in KNOWN_PARTIAL else f"partial:{partial}"[:512]
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


def reward_fault(trajectory: Trajectory) -> str:
    """What is said of the largest reward where it is beyond MAX_REWARD; empty where all are within."""
    named = [("reward", trajectory.reward or 0.0), *((each.name, each.value) for each in trajectory.rewards)]
    worst = max(named, key=lambda each: abs(each[1]))
    return f"{worst[0]} {worst[1]:g}; rewards are between ±{MAX_REWARD:g}" if abs(worst[1]) > MAX_REWARD else ""


def token_fault(sequence: TokenSequence, limits: ModelLimits) -> str:
    if len(sequence.token_ids) > limits.max_positions:
        return f"{len(sequence.token_ids)} tokens; the model takes {limits.max_positions}: its positions, or its window"
    worst = max(sequence.token_ids, default=0)
    if worst >= limits.vocab_size:
        return f"token id {worst}; the model's vocabulary has {limits.vocab_size}"
    sampled = [logp for logp, is_sampled in zip(sequence.logprobs, sequence.loss_mask, strict=True) if is_sampled]
    if sampled and not MIN_LOGPROB <= min(sampled) <= max(sampled) <= MAX_LOGPROB:
        return f"log p from {min(sampled):g} to {max(sampled):g}; that of a sampled token is from {MIN_LOGPROB:g} to 0"
    if sequence.loss_mask[0]:
        return "the first token is marked as sampled, but nothing comes before it that it could be predicted from"
    in_calls = [sum(sequence.loss_mask[call.start : call.end]) for call in sequence.calls]
    if sequence.calls and (
        sum(in_calls) != sum(sequence.loss_mask) or in_calls != [call.end - call.start for call in sequence.calls]
    ):
        return "its calls are not exactly its sampled tokens"
    if any(later.start < call.end for call, later in pairwise(sequence.calls)):
        return "its calls overlap, or are not in the order of their tokens"
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

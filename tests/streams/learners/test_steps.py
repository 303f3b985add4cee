"""A whole step, from rewards to gradients, against each paper's formula over plain, unpacked forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.trajectories import TokenSequence, Trajectory
from fulgurite.streams.learners.learner import BadStep, Learner, StepResult, load_learner
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.reference import Reference
from fulgurite.streams.learners.schedule import learning_rate
from fulgurite.streams.trainer.samples import TrainingSet, training_set
from fulgurite.streams.trainer.windows import Member, Window
from tests.streams.learners.test_packed_scoring import SIZES, model_of
from tests.streams.trainer_world import build_model

REWARDS = [[1.0, 0.0, 0.25], [0.5, 0.5], [2.0, 0.0]]
"""Of three groups; the second has no signal."""
LENGTHS = [[3, 5, 2], [4, 1], [1, 6]]
"""Sampled tokens of each rollout; the first of all has two sequences of so many."""
CONSTANT = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("steps") / "model", seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("steps") / "reference", seed=2)


def window(folder: Path, spread: float = 0.3) -> Window:
    """Rollouts of an older version whose log p is off by a deviation of `spread`."""
    generator = torch.Generator().manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups: list[list[Member]] = []
    for number, (rewards, lengths) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        groups.append([])
        for member, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
            sequences: list[TokenSequence] = []
            for _ in range(2 if number == member == 0 else 1):
                tokens = torch.randint(0, 16, (length + 2,), generator=generator).tolist()
                mask = [0, 0] + [1] * length
                noise = spread * torch.randn(length, generator=generator)
                with torch.no_grad():
                    old = (log_p(model, tokens, mask) + noise).clamp(max=-1e-3).tolist()
                spans = [VersionSpan(version=1, start=2, end=length + 2)]
                sequences.append(
                    TokenSequence(token_ids=tokens, loss_mask=mask, logprobs=[0.0, 0.0, *old], weight_versions=spans)
                )
            rollout = f"r-g{number}-r{member}"
            groups[-1].append(
                Member(Trajectory(rollout_id=rollout, status="succeeded", reward=reward, sequences=sequences))
            )
    return Window(2, groups, [])


def log_p(model: Any, tokens: list[int], mask: list[int]) -> Tensor:
    """Of the sampled tokens, from one plain forward pass."""
    scores = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].float(), dim=-1)
    places = torch.tensor([position for position, sampled in enumerate(mask) if sampled])
    return scores[places - 1, torch.tensor(tokens)[places]]


def settings_of(**changes: Any) -> TrainerSettings:
    return TrainerSettings.model_validate({"max_grad_norm": 1e9, "micro_batch_tokens": 12, "warmup_steps": 0} | changes)


def trained(learner: Learner) -> dict[str, Any]:
    """Parameters by name, as the wrapped model has them with `model.` before it."""
    engine: Any = learner.engine
    return engine._named


def stepped(
    folder: Path, settings: TrainerSettings, training: TrainingSet
) -> tuple[StepResult, dict[str, Tensor], Learner]:
    """What the learner did, and the gradients it did it with."""
    learner = load_learner(folder, settings)
    gradients: dict[str, Tensor] = {}
    update = learner.engine.update

    def watched(learning_rate: float, norm_limit: float = math.inf) -> float:
        for name, parameter in trained(learner).items():
            gradients[name.removeprefix("model.")] = parameter.grad.clone()
        return update(learning_rate, norm_limit)

    learner.engine.update = watched
    return learner.step(training.samples, 2), gradients, learner


def group_z(reward: float, group: list[float]) -> float:
    mean = sum(group) / len(group)
    return (reward - mean) / (math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1)) + 1e-6)


def centred(reward: float, group: list[float]) -> float:
    return reward - sum(group) / len(group)


def without_itself(reward: float, group: list[float]) -> float:
    return reward - (sum(group) - reward) / (len(group) - 1)


def ppo(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


Found = list[tuple[Tensor, Tensor, float, list[float]]]
"""Of each sequence: log p now and when sampled, its rollout's reward, its group's."""


def dapo(found: Found) -> Tensor:
    tokens = sum(len(now) for now, *_ in found)
    parts = [ppo((now - old).exp(), group_z(r, group), 0.2, 0.28).sum() for now, old, r, group in found]
    return torch.stack(parts).sum() / tokens


def grpo(found: Found) -> Tensor:
    parts = [ppo((now - old).exp(), group_z(r, group), 0.2, 0.2).mean() for now, old, r, group in found]
    return torch.stack(parts).sum() / len(found)


def dr_grpo(found: Found) -> Tensor:
    parts = [ppo((now - old).exp(), centred(r, group), 0.2, 0.2).sum() for now, old, r, group in found]
    return torch.stack(parts).sum() / (len(found) * CONSTANT)


def gspo(found: Found) -> Tensor:
    parts = [ppo((now - old).mean().exp(), group_z(r, group), 0.05, 0.05) for now, old, r, group in found]
    return torch.stack(parts).sum() / len(found)


def rloo(found: Found) -> Tensor:
    tokens = sum(len(now) for now, *_ in found)
    parts = [ppo((now - old).exp(), without_itself(r, group), 0.2, 0.2).sum() for now, old, r, group in found]
    return torch.stack(parts).sum() / tokens


def cispo(found: Found) -> Tensor:
    tokens = sum(len(now) for now, *_ in found)
    parts = [-((now - old).detach().exp().clamp(max=5.0) * group_z(r, g) * now).sum() for now, old, r, g in found]
    return torch.stack(parts).sum() / tokens


def masked_reinforce(found: Found) -> Tensor:
    tokens = sum(len(now) for now, *_ in found)
    parts: list[Tensor] = []
    for now, old, reward, group in found:
        ratio = (now - old).detach().exp()
        kept = torch.where((ratio >= 0.8) & (ratio <= 1.25), ratio, 0.0)
        parts.append(-(kept * without_itself(reward, group) * now).sum())
    return torch.stack(parts).sum() / tokens


def by_hand(folder: Path, taken: Window, formula: Callable[[Found], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of groups with a signal."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Found = []
    for group, rewards in zip(taken.groups, REWARDS, strict=True):
        if len(set(rewards)) == 1:
            continue
        for member, reward in zip(group, rewards, strict=True):
            for sequence in member.trajectory.sequences:
                now = log_p(model, sequence.token_ids, sequence.loss_mask)
                found.append((now, torch.tensor(sequence.logprobs[2:]), reward, rewards))
    loss = formula(found)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


MASKED = {"loss": "reinforce", "correction": "mask", "importance_low": 0.8, "importance_cap": 1.25}


@pytest.mark.parametrize(
    ("formula", "changes"),
    [
        (dapo, {}),
        (grpo, {"loss": "grpo"}),
        (dr_grpo, {"loss": "dr_grpo", "length_constant": CONSTANT}),
        (gspo, {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05}),
        (rloo, {"loss": "rloo"}),
        (cispo, {"loss": "cispo"}),
        (masked_reinforce, MASKED),
    ],
)
def test_a_steps_gradient_is_the_papers(
    folder: Path, formula: Callable[[Found], Tensor], changes: dict[str, Any]
) -> None:
    taken, settings = window(folder), settings_of(**changes)
    result, gradients, _ = stepped(folder, settings, training_set(taken, settings))
    loss, expected = by_hand(folder, taken, formula)
    assert result.loss == pytest.approx(loss, abs=1e-6)
    assert result.tokens == 20, "3 twice, 5, 2, 1 and 6"
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max().item() < 2e-5 * max(1.0, scale), name


def test_reinforce_plus_plus_normalises_over_the_tokens_of_all_groups_also_of_silent_ones(folder: Path) -> None:
    settings = settings_of(loss="reinforce_plus_plus", zero_variance="drop")
    found = training_set(window(folder), settings)
    rewards = [reward for group in REWARDS for reward in group]
    counts = [6, 5, 2, 4, 1, 1, 6]
    mean = sum(r * n for r, n in zip(rewards, counts, strict=True)) / 25
    deviation = math.sqrt(sum((r - mean) ** 2 * n for r, n in zip(rewards, counts, strict=True)) / 24)
    expected = [(r - mean) / deviation for r in (1.0, 0.0, 0.25, 2.0, 0.0)]
    by_rollout = {sample.rollout_id: sample.advantage for sample in found.samples}
    assert list(by_rollout.values()) == pytest.approx(expected, rel=1e-6)
    kept = training_set(window(folder), settings_of(loss="reinforce_plus_plus"))
    assert len(kept.rollout_ids) == 7
    assert kept.groups_without_signal == 1
    assert not kept.dropped
    silent = [sample.advantage for sample in kept.samples if sample.rollout_id not in found.rollout_ids]
    assert silent == pytest.approx([(0.5 - mean) / deviation] * 2, rel=1e-6), "they are no worse a signal than others"
    of_group = training_set(window(folder), settings_of(loss="reinforce_plus_plus_baseline"))
    assert of_group.rollout_ids == found.rollout_ids, "compared within the group they say nothing"


def test_length_costs_reward_but_makes_no_signal(folder: Path) -> None:
    changes = {"overlong_buffer_tokens": 4, "overlong_max_tokens": 6, "overlong_penalty": 0.5}
    found = training_set(window(folder), settings_of(advantage="mean_centred", **changes))
    assert found.penalties == pytest.approx([-0.5, -0.375, 0.0, -0.25, 0.0, 0.0, -0.5])
    assert found.rewards == [1.0, 0.0, 0.25, 0.5, 0.5, 2.0, 0.0]
    by_rollout = {sample.rollout_id: sample.advantage for sample in found.samples}
    assert list(by_rollout.values())[3:] == pytest.approx([1.25, -1.25])
    assert len(found.dropped) == 2, "the second group differs in length only"


def test_a_penalty_holds_the_policy_to_the_reference(folder: Path, other: Path) -> None:
    """k3 is 0 and flat against itself; against another model its gradient is that of its formula."""
    taken = window(folder)
    plain, base, _ = stepped(folder, settings_of(), training_set(taken, settings_of()))
    same = settings_of(kl_coefficient=0.5, model=folder)
    result, gradients, _ = stepped(folder, same, training_set(taken, same))
    assert result.loss == pytest.approx(plain.loss, abs=1e-6)
    assert result.metrics["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert all((gradients[name] - base[name]).abs().max().item() < 1e-5 for name in base)

    against = settings_of(kl_coefficient=0.5, model=folder, reference=other)
    result, gradients, learner = stepped(folder, against, training_set(taken, against))
    frozen: Any = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    penalties: list[Tensor] = []

    def formula(found: Found) -> Tensor:
        sequences = [s for g in (taken.groups[0], taken.groups[2]) for m in g for s in m.trajectory.sequences]
        for (now, *_), sequence in zip(found, sequences, strict=True):
            with torch.no_grad():
                difference = log_p(frozen, sequence.token_ids, sequence.loss_mask) - now.detach()
            d = difference + now.detach() - now
            penalties.append(d.exp() - 1 - d)
        return dapo(found) + 0.5 * torch.cat(penalties).sum() / 20

    loss, expected = by_hand(folder, taken, formula)
    assert result.loss == pytest.approx(loss, abs=1e-6)
    assert result.metrics["actor/kl_loss"] == pytest.approx(torch.cat(penalties).mean().item(), abs=1e-5)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert all((gradients[name] - expected[name]).abs().max().item() < 2e-5 * max(1, scale) for name in expected)
    assert trained(learner).keys() == {f"model.{name}" for name in expected}, "the reference is not trained"


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_weights_have_no_kl_to_each_other_in_half_precision(tmp_path: Path, tied: bool) -> None:
    sizes: dict[str, Any] = SIZES | {"vocab_size": 16, "initializer_range": 0.3, "num_local_experts": 2}
    model_of(MixtralConfig(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    settings = settings_of(dtype="bfloat16", kl_coefficient=0.5, model=tmp_path, max_logprob_difference=1e9)
    learner = load_learner(tmp_path, settings)
    training = training_set(window(tmp_path), settings)
    assert learner.step(training.samples, 2).metrics["actor/kl_loss"] == pytest.approx(0.0, abs=1e-9)
    assert learner.step(training.samples, 2).metrics["actor/kl_loss"] > 1e-7


@pytest.mark.parametrize("changes", [{"entropy_coefficient": 0.5}, {"kl_coefficient": 5.0}, {"minibatches": 2}])
def test_the_policy_term_is_told_apart_from_the_whole_loss(folder: Path, other: Path, changes: dict[str, Any]) -> None:
    """As verl's actor/pg_loss: penalty and bonus are not in it. Over several micro-batches and updates."""
    taken = window(folder)
    beside = {"kl_coefficient": 0.5, "entropy_coefficient": 0.5} if "minibatches" in changes else {}
    fields = {"learning_rate": 1e-9} | changes  # so that a second update sees the same policy
    plain, _, _ = stepped(folder, settings_of(**fields | {"kl_coefficient": 0.0, "entropy_coefficient": 0.0}),
                          training_set(taken, settings_of()))  # fmt: skip
    settings = settings_of(
        **fields | beside, model=folder, reference=other if fields.get("kl_coefficient") or beside else None
    )
    result, _, _ = stepped(folder, settings, training_set(taken, settings))
    assert plain.metrics["actor/pg_loss"] == pytest.approx(plain.loss, abs=1e-6)
    assert result.metrics["actor/pg_loss"] == pytest.approx(plain.loss, abs=1e-5)
    assert abs(result.loss - plain.loss) > 0.01


def test_a_reference_with_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="a vocabulary of 20 tokens, the policy one of 16"):
        load_learner(folder, settings_of(kl_coefficient=0.1, model=folder, reference=tmp_path))


def test_the_entropy_bonus_has_a_gradient(folder: Path) -> None:
    """With nothing else to learn it raises the entropy."""
    changes = {"entropy_coefficient": 1.0, "learning_rate": 1e-3, "zero_variance": "keep", "loss": "rloo"}
    settings = settings_of(**changes)
    training = training_set(window(folder), settings)
    flat = [sample for sample in training.samples if sample.advantage == 0.0]
    assert len(flat) == 2
    learner = load_learner(folder, settings)
    entropies = [learner.step(flat, 2).metrics["actor/entropy"] for _ in range(5)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 1e-4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"grad_norm_limit": 1e-3}, "grad_norm:"),
        ({"max_mismatch_kl": 1e-3}, "mismatch_kl:"),
        ({"min_effective_sample_size": 0.99}, "effective_sample_size:"),
    ],
)
def test_a_window_past_a_bound_is_skipped_or_stops_the_run(folder: Path, changes: dict[str, Any], reason: str) -> None:
    settings = settings_of(on_bad_step="skip", **changes)
    training = training_set(window(folder), settings)
    learner = load_learner(folder, settings)
    before = [parameter.clone() for parameter in trained(learner).values()]
    result = learner.step(training.samples, 2)
    assert result.skipped.startswith(reason)
    assert result.tokens == 0
    assert all(math.isfinite(value) for value in (result.loss, result.grad_norm, *result.metrics.values()))
    assert all(torch.equal(old, new) for old, new in zip(before, trained(learner).values(), strict=True))
    state = learner.engine.state()
    assert state is not None
    assert state.updates == 0

    with pytest.raises(BadStep, match=rf"{reason[:-1]} .*rollouts r-g0-r0.*trainer.on_bad_step = skip"):
        load_learner(folder, settings.model_copy(update={"on_bad_step": "stop"})).step(training.samples, 2)
    wide = settings.model_copy(update=dict.fromkeys(changes))
    assert not load_learner(folder, wide).step(training.samples, 2).skipped


def test_a_skipped_window_names_its_rollouts_and_a_later_one_is_trained_on(folder: Path) -> None:
    settings = settings_of(on_bad_step="skip")
    training = training_set(window(folder), settings)
    learner = load_learner(folder, settings)
    poisoned = [*training.samples]
    poisoned[0].behaviour_logprobs[3] = math.nan
    result = learner.step(poisoned, 2)
    assert result.skipped == "nonfinite:loss nan"
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    told = training.without(result.left_out)
    assert (told.samples, told.rollout_ids) == ([], [])
    assert {(d.rollout_id, d.reason) for d in told.dropped if d.reason != "zero_variance"} == {
        (rollout_id, "nonfinite:loss nan") for rollout_id in training.rollout_ids
    }
    poisoned[0].behaviour_logprobs[3] = -1.0
    assert learner.step(training.samples, 2).metrics["actor/lr"] == settings.learning_rate


def test_the_learning_rate_rises_and_falls_as_said() -> None:
    def rates(**changes: Any) -> list[float]:
        fields = {"learning_rate": 1.0, "warmup_steps": 2, "steps": 6, "min_learning_rate_ratio": 0.2} | changes
        return [learning_rate(TrainerSettings.model_validate(fields), updates) for updates in range(8)]

    assert rates() == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates(schedule="linear") == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    half = math.sqrt(0.5)
    falling = [1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2, 0.2]
    assert rates(schedule="cosine") == pytest.approx([0.5, 1.0, *falling])
    assert rates(warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_penalty_taken_from_rewards_moves_advantages_and_adds_no_gradient(
    folder: Path, other: Path, epochs: int
) -> None:
    changes = {"advantage": "mean_centred", "kl_in_reward": True, "kl_estimator": "k1", "kl_coefficient": 0.5}
    settings = settings_of(reference=other, epochs=epochs, **changes)
    taken = window(folder)
    frozen: Any = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    lowered: list[list[float]] = []
    means: list[float] = []
    for group, rewards in ((taken.groups[0], REWARDS[0]), (taken.groups[2], REWARDS[2])):
        lowered.append([])
        for member, reward in zip(group, rewards, strict=True):
            for sequence in member.trajectory.sequences:
                with torch.no_grad():
                    kl = torch.tensor(sequence.logprobs[2:]) - log_p(frozen, sequence.token_ids, sequence.loss_mask)
                reward -= 0.5 * kl.sum().item()
                means.append(kl.mean().item())
            lowered[-1].append(reward)
    advantages = [centred(reward, rewards) for rewards in lowered for reward in rewards]
    plain = settings_of(advantage="mean_centred", epochs=epochs)
    by_rollout = dict(zip(training_set(taken, plain).rollout_ids, advantages, strict=True))
    expected = [
        replace(sample, advantage=by_rollout[sample.rollout_id]) for sample in training_set(taken, plain).samples
    ]
    result = load_learner(folder, settings).step(training_set(taken, settings).samples, 2)
    same = load_learner(folder, plain).step(expected, 2)
    assert result.loss == pytest.approx(same.loss, abs=1e-5)
    assert result.grad_norm == pytest.approx(same.grad_norm, rel=1e-4)
    assert result.metrics["actor/reward_kl_penalty"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    flat = [reward for rewards in lowered for reward in rewards]
    assert result.metrics["critic/rewards/mean"] == pytest.approx(sum(flat) / len(flat), rel=1e-4)
    assert result.metrics["critic/advantages/max"] == pytest.approx(max(advantages), rel=1e-4)
    assert "actor/kl_loss" not in result.metrics


class Same:
    """A reference policy from which nobody has moved away."""

    def logprobs(self, batch: PackedBatch) -> Tensor:
        return batch.behaviour_logprobs


def test_a_penalty_of_nothing_taken_from_rewards_changes_nothing(folder: Path) -> None:
    """Also where the baseline is over the window: its second group is dropped, and counts in it."""
    dropping = {"loss": "reinforce_plus_plus", "zero_variance": "drop"}
    in_reward = settings_of(**dropping, kl_in_reward=True, kl_coefficient=0.5, reference=folder)
    plain, taken = settings_of(**dropping), window(folder)
    training = training_set(taken, in_reward)
    assert [sample.rollout_id for sample in training.compared] == ["r-g1-r0", "r-g1-r1"]
    learner = load_learner(folder, in_reward)
    learner = Learner(learner.engine, in_reward, reference=cast(Reference, Same()))
    result = learner.step(training.samples, 2, training.compared)
    same = load_learner(folder, plain)
    expected = same.step(training_set(taken, plain).samples, 2)
    assert (result.loss, result.grad_norm, result.tokens) == (expected.loss, expected.grad_norm, expected.tokens)
    assert result.metrics["actor/reward_kl_penalty"] == 0.0
    assert all(torch.equal(tensor, trained(same)[name]) for name, tensor in trained(learner).items())


@pytest.mark.parametrize("loss", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_all_that_a_window_compares_pays_the_penalty(folder: Path, other: Path, loss: str) -> None:
    """REINFORCE++: each token for itself and those after it, in later sequences too; with its baseline for all."""
    changes = {"kl_in_reward": True, "kl_estimator": "k1", "kl_coefficient": 0.5, "reference": other}
    settings = settings_of(loss=loss, **changes)
    taken, plain = window(folder), settings_of(loss=loss)
    frozen: Any = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)

    def paid(member: Member) -> list[float]:
        """What each of its tokens led to."""
        with torch.no_grad():
            kl = torch.cat(
                [
                    torch.tensor(s.logprobs[2:]) - log_p(frozen, s.token_ids, s.loss_mask)
                    for s in member.trajectory.sequences
                ]
            )
        costs = kl.flip(0).cumsum(0).flip(0) if loss == "reinforce_plus_plus" else kl.sum().expand_as(kl)
        return ((member.trajectory.reward or 0.0) - 0.5 * costs).tolist()

    left = [[paid(member) for member in group] for group in taken.groups]
    if loss == "reinforce_plus_plus_baseline":
        means = [sum(tokens[0] for tokens in group) / len(group) for group in left]
        left = [[[v - mean for v in tokens] for tokens in group] for group, mean in zip(left, means, strict=True)]
    flat = torch.tensor([value for group in left for tokens in group for value in tokens], dtype=torch.float64)
    mean, deviation = flat.mean().item(), (flat.var() + 1e-8).sqrt().item()
    by_rollout = {
        member.trajectory.rollout_id: iter([(value - mean) / deviation for value in tokens])
        for group, found in zip(taken.groups, left, strict=True)
        for member, tokens in zip(group, found, strict=True)
    }
    expected = [
        replace(s, token_advantages=tuple(next(by_rollout[s.rollout_id]) for _ in range(sum(s.loss_mask))))
        for s in training_set(taken, plain).samples
    ]
    training = training_set(taken, settings)
    result = load_learner(folder, settings).step(training.samples, 2, training.compared)
    same = load_learner(folder, plain).step(expected, 2)
    assert result.loss == pytest.approx(same.loss, abs=1e-5)
    assert result.grad_norm == pytest.approx(same.grad_norm, rel=1e-4)

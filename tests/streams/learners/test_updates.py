"""Several optimizer updates a window: which samples each has, decoupled PPO's numbers, bounds, and restarts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from fulgurite.schemas.errors import LogprobMismatch, SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.schemas.training import DroppedRollout
from fulgurite.streams.learners.learner import BadStep, Learner, load_learner
from fulgurite.streams.learners.schedule import learning_rate
from fulgurite.streams.learners.updates import left_out, trained_tokens, update_plan
from fulgurite.streams.trainer.objective import check_objective
from fulgurite.streams.trainer.sample import Sample
from fulgurite.streams.trainer.samples import TrainingSet
from tests.streams.trainer_world import build_model

CAP = 1.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("updates") / "model", seed=1)


def settings_of(**changes: Any) -> TrainerSettings:
    fields = {"learning_rate": 2e-2, "warmup_steps": 0, "micro_batch_tokens": 20, "correction": "truncate"}
    return TrainerSettings.model_validate(fields | {"importance_cap": CAP, "epochs": 2, "minibatches": 2} | changes)


def samples(count: int = 6) -> list[Sample]:
    """Two of them of one rollout."""
    generator = torch.Generator().manual_seed(0)
    found: list[Sample] = []
    for number in range(count):
        length = 5 + 3 * (number % 3)
        tokens = torch.randint(0, 16, (length,), generator=generator).tolist()
        old = [0.0, 0.0, *(-2.7 - 0.3 * torch.randn(length - 2, generator=generator)).tolist()]
        advantage = 1.0 - 0.7 * number
        found.append(Sample(f"r{max(1, number)}", tokens, [0, 0] + [1] * (length - 2), old, [1] * length, advantage))
    return found


def weights(learner: Learner) -> dict[str, Tensor]:
    engine: Any = learner.engine
    return {name: parameter.detach().clone() for name, parameter in engine._policy.model.named_parameters()}


def log_p(model: Any, sample: Sample) -> Tensor:
    scores = torch.log_softmax(model(input_ids=torch.tensor([sample.token_ids])).logits[0], -1)
    places = torch.arange(2, len(sample.token_ids))
    return scores[places - 1, torch.tensor(sample.token_ids)[places]]


def decoupled_ppo(folder: Path, settings: TrainerSettings, window: list[Sample]) -> Any:
    """The paper's update (arXiv:2505.24298, equation 5) by a plain loop, one sequence at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=betas, weight_decay=0.0)
    with torch.no_grad():
        proximal = [log_p(model, sample) for sample in window]
    for members in update_plan(window, settings, 0):
        tokens = sum(sum(window[member].loss_mask) for member in members)
        for member in members:
            sample = window[member]
            ratio = (log_p(model, sample) - proximal[member]).exp()
            weight = (proximal[member] - torch.tensor(sample.behaviour_logprobs[2:])).exp().clamp(max=CAP)
            clipped = ratio.clamp(0.8, 1.28)
            objective = torch.minimum(ratio * sample.advantage, clipped * sample.advantage)
            (-(weight * objective).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_every_sample_is_in_one_update_of_each_epoch_with_its_rollout(
    rollouts: list[int], epochs: int, minibatches: int, done: int
) -> None:
    settings = settings_of(epochs=epochs, minibatches=minibatches)
    window = [replace(samples(1)[0], rollout_id=f"r{rollout}") for rollout in rollouts]
    plan = update_plan(window, settings, done)
    parts = min(minibatches, len(set(rollouts)))
    assert len(plan) == epochs * parts
    assert plan == update_plan(window, settings, done)
    for epoch in range(epochs):
        updates = plan[epoch * parts : (epoch + 1) * parts]
        assert sorted(number for update in updates for number in update) == list(range(len(window)))
        for update in updates:
            assert update
            inside, all_numbers = {rollouts[number] for number in update}, range(len(window))
            assert [number for number in all_numbers if rollouts[number] in inside] == update


def test_each_window_and_epoch_is_split_anew() -> None:
    window = [replace(samples(1)[0], rollout_id=f"r{number}") for number in range(24)]
    plans = [update_plan(window, settings_of(), done) for done in (0, 4)]
    assert len({tuple(map(tuple, plan)) for plan in plans}) == 2
    assert plans[0][:2] != plans[0][2:]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_updates_with_a_correction_are_decoupled_ppo(folder: Path, minibatches: int) -> None:
    settings = settings_of(minibatches=minibatches)
    learner = load_learner(folder, settings)
    result = learner.step(samples(), 2)
    expected = decoupled_ppo(folder, settings, samples())
    for name, parameter in expected.named_parameters():
        assert (weights(learner)[name] - parameter).abs().max().item() < 2e-5, name
    assert result.metrics["actor/updates"] == 2 * minibatches
    assert result.metrics["update/1/ppo_kl"] == pytest.approx(0.0, abs=1e-6), "against the beginning"
    assert abs(result.metrics[f"update/{2 * minibatches}/ppo_kl"]) > 1e-4
    assert result.metrics["rollout_corr/kl"] != result.metrics["actor/ppo_kl"]
    assert result.tokens == sum(sum(sample.loss_mask) for sample in samples())


def test_the_numbers_of_versions_say_nothing_of_who_is_in_which_update(folder: Path) -> None:
    """A replay begins with version 1, its source with one more than the resource had."""
    source, replay = load_learner(folder, settings_of()), load_learner(folder, settings_of())
    for number in range(2):
        source.step(samples(), 6 + number)
        replay.step(samples(), 2 + number)
    assert all(torch.equal(tensor, weights(replay)[name]) for name, tensor in weights(source).items())


def test_a_run_with_several_updates_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole = load_learner(folder, settings_of())
    half = load_learner(folder, settings_of())
    for learner in (whole, half):
        learner.step(samples(), 2)
    (tmp_path / "weights").mkdir()
    half.save_weights(tmp_path / "weights")
    half.save_state(tmp_path / "optimizer.pt")
    resumed = load_learner(tmp_path / "weights", settings_of(), tmp_path / "optimizer.pt")
    results = [learner.step(samples(), 3) for learner in (whole, resumed)]
    assert results[0].loss == results[1].loss
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_what_forbids_a_step_is_found_before_the_first_update(folder: Path) -> None:
    learner = load_learner(folder, settings_of(max_mismatch_kl=1e-6, on_bad_step="skip"))
    before = weights(learner)
    assert learner.step(samples(), 2).skipped.startswith("mismatch_kl:")
    assert learner.step(samples(), 1).skipped.startswith("logprob_mismatch:")
    assert all(torch.equal(tensor, weights(learner)[name]) for name, tensor in before.items())
    with pytest.raises(LogprobMismatch):
        load_learner(folder, settings_of(on_bad_step="stop")).step(samples(), 1)


def test_an_update_past_a_bound_is_left_out_alone(folder: Path) -> None:
    norms = load_learner(folder, settings_of(epochs=1)).step(samples(), 2).metrics
    first, second = norms["update/1/grad_norm"], norms["update/2/grad_norm"]
    limit = (first + second) / 2
    settings = settings_of(epochs=1, grad_norm_limit=limit, on_bad_step="skip")
    learner = load_learner(folder, settings)
    result = learner.step(samples(), 2)
    assert not result.skipped
    assert (result.metrics["actor/updates"], result.metrics["actor/updates_skipped"]) == (1.0, 1.0)
    assert result.grad_norm < limit
    with pytest.raises(BadStep, match="grad_norm"):
        load_learner(folder, settings.model_copy(update={"on_bad_step": "stop"})).step(samples(), 2)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.sampled_from(["", "nonfinite:loss nan", "grad_norm:9"]), min_size=12, max_size=12),
)
def test_a_rollout_is_trained_on_or_left_out_with_a_reason_of_one_of_its_updates(
    rollouts: list[int], epochs: int, minibatches: int, faults: list[str]
) -> None:
    window = [replace(samples(1)[0], rollout_id=f"r{rollout}") for rollout in rollouts]
    plan = update_plan(window, settings_of(epochs=epochs, minibatches=minibatches), 1)
    fates = list(zip(plan, faults, strict=False))
    out = left_out(window, fates)
    for rollout_id in {sample.rollout_id for sample in window}:
        own = [fault for members, fault in fates if any(window[m].rollout_id == rollout_id for m in members)]
        assert len(own) == epochs
        assert (rollout_id in out) == all(own)
        assert rollout_id not in out or out[rollout_id] == own[0]
    trained = [sample for sample in window if sample.rollout_id not in out]
    assert trained_tokens(window, fates) == sum(sum(sample.loss_mask) for sample in trained)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_ledger_has_only_those_that_an_update_was_made_of(folder: Path, epochs: int) -> None:
    """Two rollouts in an update each; the gradient of r1's is always too large."""
    window = [replace(samples(2)[1], rollout_id=f"r{number}", advantage=(1e-3, -1e3)[number]) for number in range(2)]
    settings = settings_of(epochs=epochs, grad_norm_limit=1.0, on_bad_step="skip")
    result = load_learner(folder, settings).step(window, 2)
    assert (result.metrics["actor/updates"], result.metrics["actor/updates_skipped"]) == (epochs, epochs)
    assert not result.skipped
    assert result.tokens == sum(window[0].loss_mask)
    assert result.left_out.keys() == {"r1"}
    assert result.left_out["r1"].startswith("grad_norm:")
    whole = TrainingSet(window, ["r0", "r1"], [], [0.0, 1.0], [0.0, 0.0], 1, 0)
    told = whole.without(result.left_out)
    assert (told.rollout_ids, [sample.rollout_id for sample in told.samples]) == (["r0"], ["r0"])
    assert told.dropped == [DroppedRollout(rollout_id="r1", reason=result.left_out["r1"])]
    told = whole.apart(["r1"]).without(result.left_out)
    assert (told.rollout_ids, told.again, told.dropped) == (["r0"], [], []), "the ledger has named r1"


def test_where_every_update_is_refused_each_rollout_has_its_own_reason(folder: Path) -> None:
    settings = settings_of(epochs=1, grad_norm_limit=1e-9, on_bad_step="skip")
    result = load_learner(folder, settings).step(samples(), 2)
    assert result.skipped.startswith("grad_norm:")
    assert result.tokens == 0
    assert result.left_out.keys() == {sample.rollout_id for sample in samples()}
    assert len(set(result.left_out.values())) == 2, "the norms of two updates"


def test_the_schedule_counts_updates() -> None:
    settings = settings_of(schedule="linear", steps=5)
    assert learning_rate(settings, 20) == 0.0
    assert learning_rate(settings, 10) == pytest.approx(settings.learning_rate / 2)
    assert math.isclose(learning_rate(settings, 0), settings.learning_rate)
    check_objective(settings_of(dual_clip=3.0))
    with pytest.raises(SettingsError, match="one update a window"):
        check_objective(settings_of(dual_clip=3.0, epochs=1, minibatches=1))

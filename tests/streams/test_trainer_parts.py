"""Samples, batches, learner, checkpoints, plan, tasks: each by itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fulgurite.producers.coordinator_client import CoordinatorClient
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.coordinator import MAX_ENQUEUE, Rollout, WaitRequest
from fulgurite.schemas.errors import Fenced, LogprobMismatch, SettingsError, StartError
from fulgurite.schemas.event import VersionSpan
from fulgurite.schemas.settings import Settings, TrainerSettings
from fulgurite.schemas.trajectories import LeftOutCall, TokenSequence, Trajectory, TrajectoryReward
from fulgurite.streams.evaluate import evaluation_rollouts, wait_for_all
from fulgurite.streams.learners.comparison import UNCHECKED_STEPS
from fulgurite.streams.learners.learner import BadStep, Learner, load_learner
from fulgurite.streams.learners.packing import pack
from fulgurite.streams.trainer.checkpoints import Checkpoints, RunState, copy_companions
from fulgurite.streams.trainer.plan import make_plan
from fulgurite.streams.trainer.samples import (
    ModelLimits,
    Sample,
    member_of,
    read_limits,
    trained_sequences,
    training_set,
)
from fulgurite.streams.trainer.tasks import group_records, load_tasks, task_input
from fulgurite.streams.trainer.windows import FILLED, Group, Member, Shape, Window, Windows
from tests.streams.trainer_world import build_model, sample

LIMITS = ModelLimits(vocab_size=16, max_positions=8)
TASKS = "tests.streams.trainer_world:bandit"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("parts") / "model", seed=1)


def sequence(**changes: Any) -> TokenSequence:
    fields: dict[str, Any] = {
        "token_ids": [0, 1, 5, 6], "loss_mask": [0, 0, 1, 1], "logprobs": [0.0, 0.0, -1.0, -2.0],
        "weight_versions": [VersionSpan(version=3, start=2, end=4)], "resource": "policy",
    }  # fmt: skip
    return TokenSequence.model_validate(fields | changes)


def trajectory(*sequences: TokenSequence, **changes: Any) -> Trajectory:
    fields: dict[str, Any] = {"rollout_id": "r-g0-r0", "status": "succeeded", "reward": 1.0}
    return Trajectory.model_validate({**fields, "sequences": list(sequences), **changes})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (trajectory(sequence()), ""),
        (trajectory(sequence(), status="failed"), "failed"),
        (trajectory(sequence(), partial="no_reward", reward=None), "no_reward"),
        (trajectory(sequence(), partial="deadline"), "partial:deadline"),
        (trajectory(sequence(), reward=None), "no_reward"),
        (trajectory(), "no_calls"),
        (trajectory(sequence(resource="another")), "wrong_model"),
        (trajectory(sequence(resource="another"), sequence(agent="judge", loss_mask=[0, 0, 0, 0])), "wrong_model"),
        (trajectory(sequence(token_ids=[0, 1, 5, 16])), "bad_tokens"),
        (trajectory(sequence(loss_mask=[1, 0, 1, 1])), "bad_tokens"),
        (trajectory(sequence(logprobs=[0.0, 0.0, -1.0, 0.5])), "bad_tokens"),
        (trajectory(sequence(logprobs=[0.0, 0.0, -1.0, -1e39])), "bad_tokens"),
        (trajectory(sequence(logprobs=[0.5, 0.0, -9999.0, 1e-6])), ""),
        (trajectory(sequence(), reward=-1e200), "bad_reward"),
        (trajectory(sequence(), reward=1e200, status="failed"), "failed"),
        (trajectory(sequence(), rewards=[TrajectoryReward(reward_id="1", name="tool", value=1e200)]), "bad_reward"),
        (trajectory(sequence(weight_versions=[VersionSpan(version=3, start=2, end=3)])), "no_version"),
        (
            trajectory(sequence(token_ids=[0] * 9, loss_mask=[0] * 8 + [1], logprobs=[0.0] * 9)),
            "bad_tokens",
        ),
    ],
)
def test_what_cannot_be_trained_on_says_why(given: Trajectory, reason: str) -> None:
    member, fault = member_of(given, "policy", LIMITS)
    assert member.reason == reason
    assert bool(fault) == (reason in ("bad_tokens", "bad_reward", "wrong_model"))
    if reason:
        assert abs(member.trajectory.reward or 0.0) <= 1e9, "a reward that is none would be filled in"
    assert bool(member.trajectory.sequences) == (reason == "")


@pytest.mark.parametrize(
    ("resource", "agents", "reason"),
    [
        ("policy", ["solver"], ""),
        ("policy", [], "partial:unfinished"),
        ("policy", ["solver", "judge"], "partial:unfinished"),
        ("simulator", ["solver"], ""),
        ("simulator", [], "partial:sampling"),
    ],
)
def test_calls_of_agents_and_policies_that_are_not_trained_spoil_nothing(
    resource: str, agents: list[str], reason: str
) -> None:
    left_out = [
        LeftOutCall(reason="sampling", agent="user", resource="simulator"),
        LeftOutCall(reason="unfinished", agent="judge", resource="policy"),
    ]
    own = sequence(agent="solver", resource=resource)
    given = trajectory(own, partial="sampling,unfinished", left_out=left_out)
    assert member_of(given, resource, LIMITS, agents)[0].reason == reason
    unnamed = given.model_copy(update={"partial": "expired,sampling,unfinished"})
    assert "expired" in member_of(unnamed, resource, LIMITS, agents)[0].reason, "what is named nowhere is of all"


def test_the_oldest_token_of_all_sequences_decides_the_age() -> None:
    older = sequence(weight_versions=[VersionSpan(version=4, start=2, end=3), VersionSpan(version=2, start=3, end=4)])
    assert member_of(trajectory(sequence(), older), "policy", LIMITS)[0].min_version == 2


def test_one_advantage_a_rollout_broadcast_to_its_sequences_and_silent_groups_dropped() -> None:
    def member(group: int, index: int, reward: float, sequences: int) -> Member:
        return Member(trajectory(*[sequence()] * sequences, rollout_id=f"r-g{group}-r{index}", reward=reward))

    groups = [[member(0, 0, 1.0, 3), member(0, 1, 0.0, 1)], [member(1, 0, 0.5, 1), member(1, 1, 0.5, 1)]]
    found = training_set(Window(3, groups, []), TrainerSettings())
    assert found.rollout_ids == ["r-g0-r0", "r-g0-r1"]
    assert [s.advantage for s in found.samples] == pytest.approx([math.sqrt(0.5)] * 3 + [-math.sqrt(0.5)], abs=1e-5)
    assert [(d.rollout_id, d.reason) for d in found.dropped] == [(f"r-g1-r{i}", "zero_variance") for i in (0, 1)]
    assert found.rewards == [1.0, 0.0, 0.5, 0.5]
    assert found.samples[0].versions == [-1, -1, 3, 3]


def test_a_member_that_is_filled_in_counts_in_the_comparison_and_is_not_trained_on() -> None:
    """Rewards 1 and 1 say nothing; with a failed one that counts as 0 the two were good."""
    alive = [Member(trajectory(sequence(), rollout_id=f"r{n}", reward=1.0), "", 3) for n in range(2)]
    gone = Member(trajectory(rollout_id="r2", reward=0.0), FILLED)
    settings = TrainerSettings(advantage="mean_centred")
    assert training_set(Window(3, [alive], []), settings).samples == []
    found = training_set(Window(3, [[*alive, gone]], []), settings)
    assert found.rollout_ids == ["r0", "r1"]
    assert found.dropped == []
    assert [sample.advantage for sample in found.samples] == pytest.approx([1 / 3, 1 / 3])
    assert (found.rewards, found.penalties) == ([1.0, 1.0], [0.0, 0.0]), "nobody gave the third"
    gone = replace(gone, trajectory=gone.trajectory.model_copy(update={"reward": 1.0}))
    silent = training_set(Window(3, [[*alive, gone]], []), settings)
    assert [each.rollout_id for each in silent.dropped] == ["r0", "r1"], "the ledger has named r2"


def test_agents_and_policies_are_told_apart() -> None:
    given = trajectory(
        sequence(agent="planner"), sequence(agent="critic"), sequence(agent="critic", resource="other"), sequence()
    )
    assert len(trained_sequences(given, "policy")) == 3
    assert [s.agent for s in trained_sequences(given, "policy", ["critic"])] == ["critic"]
    assert [s.resource for s in trained_sequences(given, "other", ["critic"])] == ["other"]
    assert member_of(given, "policy", LIMITS, ["nobody"])[0].reason == "no_calls"


def samples_from(folder: Path, version: int = 3) -> list[Sample]:
    """Sequences the model itself sampled, of unlike lengths; some tokens are 0, which is also what pads."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[Sample] = []
    for seed in range(6):
        prompt = [0] * (1 + seed % 3) + [seed]
        tokens, logprobs = sample(model, prompt, seed)
        mask = [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
        versions = [version if sampled else -1 for sampled in mask]
        found.append(Sample(f"r{seed}", tokens, mask, logprobs, versions, 1.0 if seed % 2 else -1.0))
    return found


def test_a_token_counts_also_where_it_is_what_others_pad_with(model_folder: Path) -> None:
    samples = samples_from(model_folder)
    sampled_padding = replace(samples[0], token_ids=[*samples[0].token_ids[:-1], 0])
    learner = load_learner(model_folder, TrainerSettings())
    together, _ = learner.logprobs(pack([sampled_padding, *samples[1:]]))
    alone = torch.cat([learner.logprobs(pack([s]))[0] for s in [sampled_padding, *samples[1:]]])
    assert len(together) == 6 * 3, "all sampled tokens count, the zeros too"
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together[3:], pack(samples).behaviour_logprobs[3:], atol=1e-5)


def test_a_step_moves_towards_what_was_good_and_does_not_depend_on_micro_batches(model_folder: Path) -> None:
    samples = samples_from(model_folder)
    settings = TrainerSettings(learning_rate=1e-3, warmup_steps=0)
    learner = load_learner(model_folder, settings)
    before, _ = learner.logprobs(pack(samples))
    result = learner.step(samples, 3)
    after, _ = learner.logprobs(pack(samples))
    gain = (after - before) * pack(samples).advantages
    assert gain.sum() > 0
    assert result.tokens == 18
    assert result.metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1.0, abs=1e-4)
    assert result.metrics["actor/lr"] == 1e-3

    split = load_learner(model_folder, settings.model_copy(update={"micro_batch_tokens": 7}))
    again = split.step(samples, 3)
    assert (again.loss, again.grad_norm) == pytest.approx((result.loss, result.grad_norm), abs=1e-5)


def test_warm_up_is_linear(model_folder: Path) -> None:
    learner = load_learner(model_folder, TrainerSettings(learning_rate=1e-3, warmup_steps=4))
    samples = [replace(s, versions=[0] * len(s.versions)) for s in samples_from(model_folder)]
    rates = [learner.step(samples, 9).metrics["actor/lr"] for _ in range(5)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_mismatch_is_an_error_for_this_version_and_a_correction_for_older_ones(model_folder: Path) -> None:
    samples = samples_from(model_folder)
    samples[2].behaviour_logprobs[-1] -= 0.01
    with pytest.raises(LogprobMismatch, match=f"rollout r2, position {len(samples[2].token_ids) - 1}, "):
        load_learner(model_folder, TrainerSettings(on_bad_step="stop")).step(samples, 3)
    skipped = load_learner(model_folder, TrainerSettings()).step(samples, 3)
    assert skipped.skipped.startswith("logprob_mismatch:rollout r2, position ")
    assert (skipped.tokens, skipped.is_mismatched) == (0, True)
    assert skipped.left_out.keys() == {sample.rollout_id for sample in samples}
    assert all(math.isfinite(value) for value in (skipped.loss, skipped.grad_norm, *skipped.metrics.values()))
    assert load_learner(model_folder, TrainerSettings()).step(samples, 4).tokens == 18


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_cannot_be_compared_changes_nothing_while_the_sampler_is_known_to_disagree(
    model_folder: Path, tmp_path: Path, epochs: int
) -> None:
    samples = samples_from(model_folder)
    learner = load_learner(model_folder, TrainerSettings(epochs=epochs))
    doubtful = learner.step(samples, 4, is_mismatched=True)
    assert doubtful.skipped.startswith("logprob_mismatch:nothing could be compared since")
    assert (doubtful.tokens, doubtful.is_mismatched) == (0, True)
    assert doubtful.left_out.keys() == {sample.rollout_id for sample in samples}
    assert doubtful.metrics["sampling/sampling_logp_difference/max"] < 1e-4, "the ledger shows how far off they are"
    learner.save_weights(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    with pytest.raises(LogprobMismatch, match="nothing could be compared since"):
        load_learner(model_folder, TrainerSettings(epochs=epochs, on_bad_step="stop")).step(
            samples, 4, is_mismatched=True
        )
    agreed = learner.step(samples, 3, is_mismatched=True)
    assert (agreed.tokens, agreed.is_mismatched) == (18, False)


def stale(samples: list[Sample], shift: float) -> list[Sample]:
    """As if an older policy had sampled them, with every log p lower by `shift`."""
    return [replace(s, behaviour_logprobs=[logprob - shift for logprob in s.behaviour_logprobs]) for s in samples]


def test_the_clip_decides_about_stale_tokens(model_folder: Path) -> None:
    samples = stale(samples_from(model_folder), math.log(1.25))  # every ratio is 1.25

    def norm(**changes: Any) -> float:
        settings = TrainerSettings.model_validate({"max_grad_norm": 1e9, **changes})
        result = load_learner(model_folder, settings).step(samples, 4)
        clipped.append(result.metrics["actor/pg_clipfrac"])
        return result.grad_norm

    clipped: list[float] = []
    wide, narrow = norm(), norm(clip_high=0.1)
    assert clipped == [0.0, 0.5], "half of the tokens have a positive advantage"
    assert narrow < 0.99 * wide
    truncated = norm(correction="truncate"), norm(correction="truncate", clip_high=0.1)
    assert truncated[0] == truncated[1] == pytest.approx(wide, rel=1e-4), "within clip and cap both are the same"
    assert norm(correction="truncate", importance_cap=1.0) == pytest.approx(wide / 1.25, rel=1e-4)


def test_on_policy_both_corrections_are_the_same(model_folder: Path) -> None:
    samples = samples_from(model_folder)
    norms = [
        load_learner(model_folder, TrainerSettings(correction=correction)).step(samples, 3).grad_norm
        for correction in ("clip", "truncate")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_same_version_tokens_are_measured_apart_and_missed_when_there_are_none(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = samples_from(model_folder)
    old = [replace(s, versions=[min(v, 2) for v in s.versions]) for s in stale(fresh, 0.5)]
    learner = load_learner(model_folder, TrainerSettings(learning_rate=1e-9))
    metrics = learner.step([*fresh[:3], *old[3:]], 3).metrics
    assert metrics["sampling/same_version_tokens"] == 9
    assert metrics["sampling/same_version_logp_difference/max"] < 1e-4
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.5, abs=1e-3)
    for _ in range(UNCHECKED_STEPS):
        assert "were not compared" not in caplog.text
        metrics = learner.step(old, 3).metrics
    assert metrics["sampling/same_version_tokens"] == 0
    assert "sampling/same_version_logp_difference/max" not in metrics
    assert f"{UNCHECKED_STEPS} steps without a token" in caplog.text


def test_what_is_no_number_changes_nothing(model_folder: Path, tmp_path: Path) -> None:
    samples = [replace(s, advantage=float("inf")) for s in samples_from(model_folder)]
    stops = load_learner(model_folder, TrainerSettings(on_bad_step="stop"))
    with pytest.raises(BadStep, match="nothing was published"):
        stops.step(samples, 3)
    skips = load_learner(model_folder, TrainerSettings())
    assert skips.step(samples, 3).skipped.startswith("nonfinite")
    for name, learner in (("stops", stops), ("skips", skips)):
        learner.save_weights(tmp_path / name)
        kept = (tmp_path / name / "model.safetensors").read_bytes()
        assert kept == (model_folder / "model.safetensors").read_bytes(), name


def test_a_learner_goes_on_from_its_files_bit_for_bit(model_folder: Path, tmp_path: Path) -> None:
    def save(learner: Learner, name: str) -> bytes:
        learner.save_weights(tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    samples = samples_from(model_folder)
    straight = load_learner(model_folder, TrainerSettings())
    straight.step(samples, 3)
    straight.save_weights(tmp_path / "half")
    straight.save_state(tmp_path / "state.pt")
    resumed = load_learner(tmp_path / "half", TrainerSettings(), tmp_path / "state.pt")
    straight.step(samples, 9)
    resumed.step(samples, 9)
    assert save(straight, "a") == save(resumed, "b")


def checkpoint(folder: Checkpoints, version: int, windows: Windows | None = None, step: int | None = None) -> Any:
    step = version if step is None else step
    state = RunState(run_id="r", resource="policy", version=version, step=step, offsets={0: 4, 1: 7}, asked=0)

    def weights(to: Path) -> None:
        (to / "w").write_text(str(version))

    def optimizer(to: Path) -> None:
        to.write_text("optimizer")

    return folder.write(state, windows or Windows(shape()), weights, optimizer)


def shape() -> Shape:
    return Shape(
        run_id="r", group_size=3, groups_per_step=2, groups_ahead=4, max_staleness=2, group_deadline_seconds=10
    )


def test_a_checkpoint_gives_back_the_windows_as_they_were(tmp_path: Path) -> None:
    sliding = replace(shape(), overlap_groups=1)
    windows = Windows(sliding, asked=9, settled_below=1, settled={3})
    for group, index, reason in ((1, 0, ""), (1, 1, "failed"), (2, 2, "")):
        given = trajectory(sequence(), rollout_id=f"r-g{group}-r{index}", group_id=f"r-g{group}")
        windows.add(Member(given, reason, 3), 5)
    windows.close([2])
    earlier = Member(trajectory(sequence(), rollout_id="r-g0-r1", group_id="r-g0"), "", 2)
    windows.recent = [Group(0, 5, {"r-g0-r1": earlier}, True, size=1)]
    folder = Checkpoints(tmp_path, "r", {"loss": "dapo"})
    written = checkpoint(folder, 7, windows)
    assert json.loads((written.folder / "settings.json").read_text()) == {"loss": "dapo"}
    loaded = folder.load(7)
    assert loaded == written
    assert loaded.state.offsets == {0: 4, 1: 7}
    restored = folder.windows(loaded, sliding, now_ns=99)
    assert {group.arrived_ns for group in restored.groups.values()} == {99}, "time that nobody ran does not count"
    for group in (*restored.groups.values(), *restored.recent):
        group.arrived_ns = 5
    assert restored == windows
    assert loaded.uri.startswith("file:///")
    assert loaded.state.sha256 == folder_sha256(loaded.weights)


def test_uncommitted_folders_go_old_ones_are_pruned_and_none_is_replaced(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, "r")
    for version in (1, 2, 3, 4):
        checkpoint(folder, version)
    (tmp_path / "r" / ".tmp-v000009-x").mkdir()
    with pytest.raises(Fenced, match="another process"):
        checkpoint(folder, 4)
    assert len(folder.uncommitted(3).remove()) == 3  # version 4 and two half-written ones
    folder.prune(3, 2)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["v000002", "v000003"]
    assert [(tmp_path / "r" / f"v00000{n}" / "optimizer.pt").exists() for n in (2, 3)] == [False, True]
    with pytest.raises(StartError, match="version 4 is committed, but its checkpoint"):
        folder.load(4)
    (tmp_path / "r" / "v000003" / "weights" / "w").write_text("changed")
    with pytest.raises(StartError, match="the files were changed"):
        folder.load(3)


def test_a_predecessor_that_wakes_up_removes_nothing_that_its_successor_needs(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, "r")
    for version in (1, 2, 3):
        checkpoint(folder, version)
    folder.prune(2, 2)  # whose version 2 is committed, while another process has written version 3 and not committed
    assert len(folder.uncommitted(2).remove()) == 1
    folder.load(2)
    assert (tmp_path / "r" / "v000002" / "optimizer.pt").exists()


def test_of_a_run_the_log_does_not_know_only_the_first_checkpoint_is_a_leftover(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, "r")
    checkpoint(folder, 4, step=0)
    (tmp_path / "r" / ".tmp-v000004-x").mkdir()
    assert len(folder.uncommitted(None).remove()) == 2
    checkpoint(folder, 4, step=0)
    checkpoint(folder, 5, step=1)
    with pytest.raises(StartError, match=r"v000005 is a checkpoint of run r \(step 1\), .* kafka.topic_prefix"):
        folder.uncommitted(None).remove()
    (tmp_path / "r" / "v000004" / "state.json").unlink()
    with pytest.raises(StartError, match=r"v000004 .*step unknown"):
        folder.uncommitted(None).remove()
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["v000004", "v000005"]


def test_folders_further_ahead_of_the_log_than_a_crash_leaves_are_kept(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, "r")
    for version in (1, 2, 3):
        checkpoint(folder, version)
    with pytest.raises(StartError, match=r"v000003 .*only up to version 1"):
        folder.uncommitted(1).remove()
    assert len(list((tmp_path / "r").iterdir())) == 3


def test_a_disk_that_refuses_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot write the checkpoint"):
        checkpoint(Checkpoints(tmp_path / "file", "r"), 1)


def test_companions_are_copied_weights_are_not(model_folder: Path, tmp_path: Path) -> None:
    folder, version = tmp_path / "model", tmp_path / "version"
    shutil.copytree(model_folder, folder)
    version.mkdir()
    companions = {"chat_template.jinja", "tokenizer.model", "merges.txt", "modeling_own.py", "LICENSE", "vocab.json"}
    others = {"tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model-q4.gguf", "pytorch_model.bin"}
    others |= {"pytorch_model.bin.index.json", "consolidated.00.pth", "model.safetensors.index.json", "x.npz"}
    for name in companions | others:
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_text("")
    copy_companions(folder, version)
    assert {path.name for path in version.iterdir()} == companions | {"generation_config.json", "tokenizer.json"}


def test_groups_are_asked_for_with_the_same_ids_every_time() -> None:
    settings = TrainerSettings(agent="solver", sampling_parameters={"max_tokens": 9})
    first = group_records(settings, shape(), load_tasks(TASKS), 4)
    assert [q.rollout_id for q in first] == ["r-g4-r0", "r-g4-r1", "r-g4-r2"]
    assert {(q.group_id, q.task_id, q.run_id, q.group_size, q.agent) for q in first} == {
        ("r-g4", "task-4", "r", 3, "solver")
    }
    assert first[0].input == {"prompt": 1}
    again = group_records(settings, shape(), load_tasks(TASKS), 4)
    assert [q.event_id for q in first] == [q.event_id for q in again]


def test_a_task_function_that_raises_says_which_task_and_what_is_expected() -> None:
    with pytest.raises(SettingsError, match=r"IndexError.* for task 2: it is asked for .* without an end"):
        task_input(["a", "b"].__getitem__, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": ""}, "trainer.run_id is empty: .* same name goes on"),
        ({"tasks": ""}, "module:function"),
        ({"tasks": "no.such.module:f"}, "cannot import no.such.module"),
        ({"tasks": "json:nothing"}, "module json has no nothing"),
        ({"sampling_parameters": {"temperature": 0.7}}, "temperature = 0.7; it must be 1"),
        ({"sampling_parameters": {"top_p": 0.9}}, "top_p"),
        ({"sampling_parameters": {"top_k": 5}}, "top_k = 5; it must be -1 or 0"),
        ({"sampling_parameters": {"min_p": 0.1}}, "min_p = 0.1; it must be 0, .* partial:sampling"),
        ({"sampling_parameters": {"presence_penalty": 0.5}}, "presence_penalty = 0.5; it must be 0"),
        ({"sampling_parameters": {"frequency_penalty": "0.5"}}, "frequency_penalty = '0.5'; it must be 0"),
        (
            {"sampling_parameters": {"extra_body": {"repetition_penalty": 1.1}}},
            "repetition_penalty = 1.1; it must be 1",
        ),
        ({"sampling_parameters": {"tool_choice": "required"}}, "tool_choice = 'required' forbids or shifts tokens"),
        ({"sampling_parameters": {"extra_body": {"guided_regex": "a+"}}}, "guided_regex = 'a.' forbids or shifts"),
        ({"run_id": "a/b"}, "run_id"),
        ({"run_id": "x" * 65}, "run_id"),
        ({"pacing_staleness": 5}, "max_staleness"),
        ({"fill_reward": -1.0}, "trainer.incomplete = mask fills nothing in"),
        ({"kl_in_reward": True, "kl_coefficient": 0.1, "model": ".", "incomplete": "fill"}, "set mask or drop"),
        ({"overlap_seconds": 5.0}, "trainer.overlap_groups is 0, windows do not slide"),
        ({"incomplete": "fill", "loss": "sft"}, "could be one that has no tokens"),
        ({"zero_variance": "refill", "loss": "sft", "best_threshold": 0.5}, "whose rewards all reach it teaches"),
        ({"minibatches": 9, "groups_per_step": 2, "group_size": 4}, "a window has 8 rollouts"),
        ({"overlap_groups": 2, "loss": "sft"}, "learns the best of a group, and in a later window"),
        ({"overlap_groups": 2, "max_staleness": 0, "pacing_staleness": 0}, "no group could be in a second window"),
    ],
)
def test_settings_that_cannot_work_say_so_before_anything_is_loaded(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plan(Settings(trainer=TrainerSettings.model_validate({"run_id": "r", "tasks": TASKS} | changes)))


def test_parameters_that_leave_the_policy_as_it_is_are_accepted() -> None:
    neutral = {"temperature": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": None, "max_tokens": 9}
    free = {"tool_choice": "auto", "response_format": {"type": "text"}, "stop": ["x"], "extra_body": {"top_k": -1}}
    make_plan(Settings(trainer=TrainerSettings(run_id="r", tasks=TASKS, sampling_parameters=neutral | free)))


def test_a_folder_that_is_no_model_says_so(tmp_path: Path, model_folder: Path) -> None:
    assert read_limits(model_folder) == ModelLimits(16, 32)
    for wrong in ([1], {"model_type": "nonesuch"}, {"model_type": "llama", "vocab_size": "many"}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        for folder in (tmp_path, tmp_path / "missing"):
            with pytest.raises(SettingsError, match="is no model folder"):
                read_limits(folder)


def test_a_config_that_rests_on_its_class_is_read_with_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 16, "n_positions": 32}))
    assert read_limits(tmp_path) == ModelLimits(16, 32)
    # As Gemma 3's own files.
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert read_limits(tmp_path) == ModelLimits(262_208, 1024)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(SettingsError, match=r"None positions .*cannot be trained here"):
        read_limits(tmp_path)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": None}, 32),
        ({"model_type": "mistral", "sliding_window": 64}, 32),
        ({"model_type": "qwen3", "sliding_window": 16}, 32),
        ({"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True}, 16),
        ({"model_type": "gemma3_text", "sliding_window": 16}, 16),
        ({"model_type": "gemma3_text", "sliding_window": 16, "layer_types": ["full_attention"] * 26}, 32),
        ({"model_type": "gemma3", "text_config": {"sliding_window": 16, "vocab_size": 16}}, 16),
    ],
)
def test_a_sequence_longer_than_a_layer_looks_back_is_none_to_train_on(
    tmp_path: Path, fields: dict[str, Any], positions: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 16, "max_position_embeddings": 32} | fields))
    limits = read_limits(tmp_path)
    assert limits.max_positions == positions
    versions = [VersionSpan(version=3, start=1, end=17)]
    tokens: dict[str, Any] = {"token_ids": [1] * 17, "loss_mask": [0, *[1] * 16], "logprobs": [-1.0] * 17}
    long = trajectory(sequence(**tokens, weight_versions=versions))
    assert (member_of(long, "policy", limits)[0].reason == "bad_tokens") == (positions == 16)


class SlowCoordinator(CoordinatorClient):
    """Each time half of those asked for have ended. They are done in the order of `begun`."""

    begun: Sequence[str] = ()

    async def wait(self, rollout_ids: Sequence[str], timeout_seconds: float = 0.0) -> list[Rollout]:
        asked = WaitRequest(rollout_ids=list(rollout_ids), timeout=timeout_seconds).rollout_ids
        assert asked[0] == self.begun[0], "a request that names only what is done last would report nothing till then"
        self.begun = self.begun[len(asked) // 2 + 1 :]
        return [Rollout.model_construct(rollout_id=name) for name in asked[: len(asked) // 2 + 1]]


async def test_an_evaluation_waits_for_more_rollouts_than_a_request_may_name() -> None:
    reported: list[tuple[int, int]] = []
    names = [f"r{number}" for number in range(MAX_ENQUEUE + 5_000, 0, -1)]
    async with SlowCoordinator("http://127.0.0.1:1") as client:
        client.begun = names
        await wait_for_all(client, names, lambda ended, of: reported.append((ended, of)))
    assert reported[-1] == (len(names), len(names))
    assert reported == sorted(set(reported))


def test_an_evaluation_asks_for_the_same_rollouts_every_time() -> None:
    settings = Settings(trainer=TrainerSettings(run_id="r", sampling_parameters={"max_tokens": 9}))

    def ask(**changes: Any) -> list[Any]:
        fields: dict[str, Any] = {"name": "before", "tasks": TASKS, "count": 3, "samples": ["greedy", "sampled"]}
        return evaluation_rollouts(settings, **fields | changes)

    asked = ask()
    assert [rollout.rollout_id for rollout in asked] == [
        f"r-val-before-{kind}-{index}" for kind in ("sampled", "greedy") for index in range(3)
    ]
    assert asked == ask()
    assert {(r.mode, r.group_id, r.metadata["evaluation"]) for r in asked} == {("val", "", "before")}
    assert [r.config.sampling_parameters["temperature"] for r in asked] == [1.0] * 3 + [0.0] * 3
    for changes in ({"name": "a b"}, {"count": 0}, {"samples": ["beam"]}, {"samples": []}):
        with pytest.raises(SettingsError):
            ask(**changes)

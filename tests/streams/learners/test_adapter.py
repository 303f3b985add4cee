"""A LoRA adapter: what it changes, what is written of it, and that a run with one goes on where it stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fulgurite.schemas.checksum import weights_sha256
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import Learner, load_learner
from fulgurite.streams.learners.packing import pack
from fulgurite.streams.trainer.checkpoints import copy_companions
from fulgurite.streams.trainer.sample import Sample
from tests.streams.trainer_world import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("adapter") / "model", seed=1)


def settings_of(folder: Path, **changes: Any) -> TrainerSettings:
    fields = {"model": folder, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "warmup_steps": 0} | changes
    return TrainerSettings.model_validate(fields)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    found: list[Sample] = []
    for number, length in enumerate((7, 12, 5)):
        tokens = torch.randint(0, 16, (length,), generator=generator).tolist()
        mask = [0, 0] + [1] * (length - 2)
        found.append(Sample(f"r{number}", tokens, mask, [-2.7] * length, [1] * length, 1.0 - number))
    return found


def trained(folder: Path, steps: int, **changes: Any) -> Learner:
    learner = load_learner(folder, settings_of(folder, **changes))
    for _ in range(steps):
        learner.step(samples(), 2)
    return learner


def logprobs(learner: Learner) -> Tensor:
    with torch.no_grad():
        return learner.logprobs(pack(samples()))[0]


def by_peft(base: Path, adapter: Path) -> Tensor:
    """The same tokens, as anybody else would score them."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    found: list[Tensor] = []
    for sample in samples():
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=torch.tensor([sample.token_ids])).logits[0], -1)
        found += [scores[at - 1, sample.token_ids[at]] for at in range(2, len(sample.token_ids))]
    return torch.stack(found)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_only_itself(folder: Path) -> None:
    base = load_learner(folder, settings_of(folder, lora_rank=0))
    assert torch.equal(logprobs(load_learner(folder, settings_of(folder))), logprobs(base))
    learner = trained(folder, 3)
    assert (logprobs(learner) - logprobs(base)).abs().max() > 1e-3
    engine: Any = learner.engine
    found = dict(engine._policy.model.named_parameters())
    for name, before in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters():
        kept = found[name if name in found else name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(kept, before), name
    state = learner.engine.state()
    assert state is not None
    assert all("lora_" in name for name in state.moments)


@pytest.mark.parametrize("target_modules", [[], ["embed_tokens", "q_proj"], ["lm_head"]])
def test_what_is_published_is_read_by_peft_and_is_the_policy(tmp_path: Path, target_modules: list[str]) -> None:
    base, version = build_model(tmp_path / "base", tie_word_embeddings=False), tmp_path / "version"
    version.mkdir()
    learner = trained(base, 2, lora_target_modules=target_modules)
    learner.save_weights(version)
    assert {path.name for path in version.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (version / "model.safetensors").exists()
    torch.testing.assert_close(by_peft(base, version), logprobs(learner), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_layer_that_is_two_gets_no_adapter(folder: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=rf"lora_target_modules = \['{name}'\].* are one \(tie_word_embeddings\)"):
        load_learner(folder, settings_of(folder, lora_target_modules=[name]))


def test_the_same_adapter_is_the_same_files(folder: Path, tmp_path: Path) -> None:
    learner = trained(folder, 1)
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        learner.save_weights(tmp_path / str(number))
    assert len({weights_sha256(tmp_path / str(number)) for number in range(6)}) == 1


def test_a_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole, half = trained(folder, 4), trained(folder, 2)
    (tmp_path / "weights").mkdir()
    half.save_weights(tmp_path / "weights")
    half.save_state(tmp_path / "optimizer.pt")
    resumed = load_learner(tmp_path / "weights", settings_of(folder), tmp_path / "optimizer.pt")
    for _ in range(2):
        resumed.step(samples(), 2)
    assert torch.equal(logprobs(resumed), logprobs(whole))


def test_a_run_goes_on_beside_the_base_it_began_with_wherever_that_lies(folder: Path, tmp_path: Path) -> None:
    learner = trained(folder, 1)
    for part in ("weights", "moved"):
        (tmp_path / part).mkdir()
    learner.save_weights(tmp_path / "weights")
    for path in folder.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "moved" / "README.md").write_text("moved")
    moved = load_learner(tmp_path / "weights", settings_of(tmp_path / "moved"))
    assert torch.equal(logprobs(moved), logprobs(learner))
    other = build_model(tmp_path / "other", seed=2)
    with pytest.raises(StartError, match=r"is an adapter for a model whose weights have sha256 .*name the model that"):
        load_learner(tmp_path / "weights", settings_of(other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_model_without_its_adapter(folder: Path, dtype: str) -> None:
    """The same penalty as against a second copy of the base, after steps that moved the policy away from it."""
    inside = trained(folder, 3, kl_coefficient=0.5, dtype=dtype)
    beside = trained(folder, 3, kl_coefficient=0.5, reference=folder, dtype=dtype)
    assert torch.equal(logprobs(inside), logprobs(beside))
    assert inside.step(samples(), 2).metrics["actor/kl_loss"] > 1e-6
    assert inside.reference_sha256() == beside.reference_sha256() == weights_sha256(folder)
    assert trained(folder, 0).reference_sha256() == ""


def test_half_precision_keeps_float32_adapters(folder: Path, tmp_path: Path) -> None:
    learner = trained(folder, 2, dtype="bfloat16", lora_target_modules=["q_proj", "v_proj"])
    engine: Any = learner.engine
    dtypes = {name: parameter.dtype for name, parameter in engine._policy.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] is torch.bfloat16
    learner.save_weights(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    torch.testing.assert_close(by_peft(folder, tmp_path), logprobs(learner).float(), atol=5e-2, rtol=0)


def test_companions_leave_an_adapters_own_word_of_its_base(folder: Path, tmp_path: Path) -> None:
    """The base may have moved since the version before."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    trained(folder, 1).save_weights(tmp_path)
    copy_companions(tmp_path / "old", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert (tmp_path / "tokenizer.json").exists()


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    trained(folder, 1).save_weights(tmp_path)
    with pytest.raises(StartError, match="rank 4 and alpha 8"):
        load_learner(tmp_path, settings_of(folder, lora_rank=8))
    with pytest.raises(StartError, match="other parts than"):
        load_learner(tmp_path, settings_of(folder, lora_target_modules=["q_proj"]))
    with pytest.raises(SettingsError, match="is a LoRA adapter, not a model"):
        load_learner(tmp_path, settings_of(folder, lora_rank=0))
    with pytest.raises(SettingsError, match=r"trainer.lora_target_modules = \['wrong'\]"):
        load_learner(folder, settings_of(folder, lora_target_modules=["wrong"]))

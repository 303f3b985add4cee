"""What is written of a policy as a version: its numbers as it has them, and files of the start model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Glm4MoeConfig, Glm4MoeForCausalLM

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.deepspeed_engine import exact_buffers
from fulgurite.streams.learners.learner import Learner, load_learner
from fulgurite.streams.learners.policy import load_policy
from fulgurite.streams.trainer.checkpoints import copy_companions
from tests.streams.learners.engine_lives import samples
from tests.streams.trainer_world import build_model


def parameters_of(learner: Learner) -> dict[str, Tensor]:
    engine: Any = learner.engine
    return dict(engine._policy.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_version_has_its_start_models_own_generation_config(tmp_path: Path, dtype: str) -> None:
    """Also one that transformers reads and would not write: a temperature, and no word of sampling."""
    model, version = build_model(tmp_path / "model"), tmp_path / "version"
    version.mkdir()
    settings = TrainerSettings.model_validate({"dtype": dtype})
    load_learner(model, settings).save_weights(version)
    assert not (version / "generation_config.json").exists(), "one that transformers made"
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')
    load_learner(model, settings).save_weights(version)
    copy_companions(model, version)
    assert (version / "generation_config.json").read_text() == (model / "generation_config.json").read_text()


def test_what_a_model_keeps_in_float32_is_written_so(tmp_path: Path) -> None:
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = torch.tensor([0.1001, 0.1002, 0.1003, 0.1004])
    model.get_buffer(name).copy_(biases)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "version").mkdir()
    policy = load_policy(tmp_path / "model")
    assert any(torch.equal(buffer, biases) for _, _, buffer in exact_buffers(policy)), "in half precision under ZeRO"
    policy.save(tmp_path / "version", torch.bfloat16)
    written = load_file(tmp_path / "version" / "model.safetensors")
    assert torch.equal(written[name], biases)
    assert written["model.layers.0.self_attn.q_proj.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_part_that_text_never_comes_to_stays_as_it_is_and_a_run_goes_on(tmp_path: Path, lora_rank: int) -> None:
    """A vision tower: it has no gradient, and AdamW nothing of it."""
    text = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": 64,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"image_size": 28, "patch_size": 14}
    tokens: dict[str, Any] = {"image_token_index": 99, "boi_token_index": 98, "eoi_token_index": 97}
    config = Gemma3Config(text_config=text, vision_config=vision | images, mm_tokens_per_image=1, **tokens)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    changes: dict[str, Any] = {"model": tmp_path / "model", "lora_rank": lora_rank, "weight_decay": 0.5}
    settings = TrainerSettings.model_validate({"warmup_steps": 0, "learning_rate": 1e-2} | changes)
    whole = load_learner(tmp_path / "model", settings)
    whole.step(samples(), 1)
    (tmp_path / "version").mkdir()
    whole.save_weights(tmp_path / "version")
    whole.save_state(tmp_path / "optimizer.pt")
    resumed = load_learner(tmp_path / "version", settings, tmp_path / "optimizer.pt")
    assert whole.step(samples(), 1).loss == resumed.step(samples(), 1).loss
    ended, again = (parameters_of(learner) for learner in (whole, resumed))
    assert all(torch.equal(ended[name], again[name]) for name in ended)
    if not lora_rank:
        start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "version"))
        towers = [name for name in start if "vision" in name or "projector" in name]
        assert towers
        assert all(torch.equal(start[name], end[name]) for name in towers)

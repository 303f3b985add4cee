"""What a step's operations are, against torch's own count of plain passes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners import adapter
from fulgurite.streams.learners.flops import Work, meter_of, peak_flops, work_of
from fulgurite.streams.learners.learner import Learner, load_learner
from fulgurite.streams.trainer.sample import Sample
from tests.streams.learners.test_packed_scoring import SIZES, model_of
from tests.streams.trainer_world import build_model

TOKENS = 24
OPT = OPTConfig(
    vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
)
SAMPLES = [
    Sample(name, [0, 1, 2, last], [0, 0, 1, 1], [0.0, 0.0, -3.5, -3.5], [1] * 4, advantage)
    for name, last, advantage in (("a", 3, 1.0), ("b", 4, -1.0))
]
SETTINGS = TrainerSettings(max_logprob_difference=1e9, warmup_steps=0)


def counted(model: Any) -> int:
    """By torch, of one sequence's pass forward and backward: of full squares, and with every position's logits."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(TOKENS).unsqueeze(0), use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def ours(work: Work) -> float:
    return work.flops([TOKENS], TOKENS) + work.pair * TOKENS**2 / 2


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        Qwen3Config(**SIZES),
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16),
        GPTNeoXConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
        OPT,
    ],
)
def test_operations_are_those_that_torch_counts(config: PreTrainedConfig) -> None:
    model = model_of(config, "eager")
    model.set_experts_implementation("eager")  # the only one whose products torch knows to count
    # What is left are the angles of rotary positions.
    assert ours(work_of(model)) == pytest.approx(counted(model), rel=1e-2)


def test_frozen_weights_have_no_gradient_of_their_own(tmp_path: Path) -> None:
    settings = TrainerSettings(model=build_model(tmp_path / "base"), lora_rank=2, lora_target_modules=["q_proj"])
    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": 6}
    model = model_of(Qwen3Config(**sizes), "eager")
    everything = ours(work_of(model))
    adapter.attach(model, tmp_path / "base", settings)
    # Below the first adapter nothing has a gradient: a part of one layer.
    assert counted(model) == pytest.approx(ours(work_of(model)), rel=5e-2)
    assert ours(work_of(model)) < 0.8 * everything


def test_a_step_of_a_model_without_llamas_names_has_a_utilisation(tmp_path: Path) -> None:
    model_of(OPT).save_pretrained(tmp_path)
    learner = load_learner(tmp_path, SETTINGS)
    assert "perf/mfu/actor" not in learner.step(SAMPLES, 2).metrics, "a CPU's peak is not known"
    meter = meter_of(model_of(OPT), "NVIDIA H200")
    assert meter is not None
    assert 0.0 < Learner(learner.engine, SETTINGS, meter=meter).step(SAMPLES, 2).metrics["perf/mfu/actor"] < 1.0


def test_what_cannot_be_counted_has_no_utilisation_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    model.config.num_experts_per_tok = 0
    with caplog.at_level(logging.WARNING):
        assert meter_of(model, "NVIDIA H200") is None
        assert meter_of(model, "NVIDIA RTX A1000 Laptop GPU") is None
        assert meter_of(model, None) is None, "without a GPU nobody asks"
    assert [record.message.partition("metrics: ")[2][:40] for record in caplog.records] == [
        "the operations of MixtralForCausalLM can",
        "what a NVIDIA RTX A1000 Laptop GPU can d",
    ]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA L40", 1.81e14),
        ("NVIDIA L4", 1.21e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
    ],
)
def test_a_peak_is_that_of_the_whole_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak

"""On a GPU: the variable-length kernel, half precision and the step's own account of the device. CI has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import load_learner
from fulgurite.streams.learners.packing import pack
from fulgurite.streams.learners.policy import Policy
from tests.streams.learners.test_packed_scoring import SIZES, alone, model_of, sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QWEN3: dict[str, Any] = SIZES | {"head_dim": 64, "hidden_size": 256}


def test_packed_sequences_in_half_precision_are_near_each_alone_in_full() -> None:
    samples = [sample(length, number) for number, length in enumerate((7, 90, 33, 60))]
    plain = model_of(Qwen3Config(**QWEN3), "eager")
    policy = Policy(model_of(Qwen3Config(**QWEN3)).cuda())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logprobs, _ = policy(pack(samples).to(torch.device("cuda")))
    expected = torch.cat([alone(plain, each) for each in samples])
    assert (logprobs.cpu().double() - expected).abs().max().item() < 5e-2
    logprobs.sum().backward()
    expected.sum().backward()
    parameters: Any = zip(policy.model.parameters(), plain.parameters(), strict=True)
    for ours, theirs in parameters:
        assert (ours.grad.cpu() - theirs.grad).norm() < 5e-2 * theirs.grad.norm()


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_step_moves_the_weights_as_on_a_cpu(tmp_path: Path, activation_checkpointing: bool) -> None:
    model_of(Qwen3Config(**QWEN3)).save_pretrained(tmp_path)
    changes: dict[str, Any] = {"warmup_steps": 0, "max_logprob_difference": 1e9, "micro_batch_tokens": 120}
    settings = TrainerSettings(dtype="bfloat16", activation_checkpointing=activation_checkpointing, **changes)
    learner = load_learner(tmp_path, settings)
    assert learner.engine.device.type == "cuda"
    result = learner.step([sample(length, number) for number, length in enumerate((7, 90, 33, 60), 1)], 1)
    assert result.grad_norm > 0.0
    assert not result.skipped

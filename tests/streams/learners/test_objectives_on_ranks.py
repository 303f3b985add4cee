"""Objectives and bounds under ZeRO on two ranks: those of the whole window, whoever has which sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.streams.learners.engine_lives import VOCABULARY, samples
from tests.streams.learners.test_engines import Life, farthest, run, steps

pytestmark = pytest.mark.timeout(600)  # processes under torchrun, which share two cores with other tests

TERMS = {"kl_coefficient": 0.5, "entropy_coefficient": 0.05}
OBJECTIVES: dict[str, Life] = {
    "masked": {"settings": {**TERMS, "loss": "dr_grpo", "length_constant": 40, "correction": "mask"}},
    "gspo": {"settings": {**TERMS, "loss": "gspo", "correction": "clip", "clip_low": 0.5, "clip_high": 0.5}},
    "lone": {"settings": {**TERMS, "loss": "grpo"}, "samples": 1},
}
UNDER = {"masked": 1, "gspo": 3, "lone": 3}
"""The ZeRO stage of each."""
LIMITED = {"grad_norm_limit": 1e-3, "on_bad_step": "skip"}
PARTLY = {"minibatches": 4, "grad_norm_limit": 0.54, "on_bad_step": "skip"}
"""Some updates of a window are within the limit."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each life's results in a folder of its name and ZeRO stage; 0 is one process alone."""
    found = tmp_path_factory.mktemp("objectives")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=33, vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(found / "m0")

    def life(name: str, stage: int, settings: dict[str, Any], **more: Any) -> Life:
        told = {"model": str(found / "m0"), **settings}
        place = {"model": str(found / "m0"), "out": str(found / f"{name}{stage}")}
        return {"zero_stage": stage, "steps": 2, "settings": told, **place, **more}

    run(
        1,
        *(life(name, 0, **more) for name, more in OBJECTIVES.items()),
        life("limited", 0, LIMITED),
        life("partly", 0, PARTLY),
    )
    run(
        2,
        *(life(name, stage, **OBJECTIVES[name]) for name, stage in UNDER.items()),
        *(life(name, stage, limits) for stage in (1, 3) for name, limits in (("limited", LIMITED), ("partly", PARTLY))),
    )
    return found


@pytest.mark.parametrize(("name", "stage"), UNDER.items())
def test_a_loss_is_that_of_the_whole_window(folder: Path, name: str, stage: int) -> None:
    """Weights of sequences, penalty, bonus and masks; also where one rank has nothing to do."""
    expected = steps(folder / f"{name}0")
    assert expected[0][0] != expected[1][0]
    assert steps(folder / f"{name}{stage}") == [pytest.approx(step, abs=2e-5) for step in expected]
    assert farthest(folder / f"{name}{stage}", folder / f"{name}0") < 2e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_a_gradient_past_the_limit_changes_nothing_on_any_rank(folder: Path, stage: int) -> None:
    norm = steps(folder / "limited0")[0][1]
    assert norm > 1e-3
    assert [step[1:3] for step in steps(folder / f"limited{stage}")] == [[pytest.approx(norm, abs=1e-5), 0]] * 2
    assert farthest(folder / f"limited{stage}", folder / "m0") == 0.0


@pytest.mark.parametrize("stage", [1, 3])
def test_every_rank_names_the_same_rollouts_of_a_refused_update(folder: Path, stage: int) -> None:
    alone, found = (json.loads((folder / f"partly{n}" / "left_out.json").read_text()) for n in (0, stage))
    assert any(0 < len(rollouts) < len(samples()) for ((_, *rollouts),) in alone)
    assert found == [[each, each] for (each,) in alone]
    tokens = {sample.rollout_id: sum(sample.loss_mask) for sample in samples()}
    for ((trained, *rollouts),) in alone:
        assert trained == sum(tokens.values()) - sum(tokens[rollout] for rollout in rollouts)
    assert farthest(folder / f"partly{stage}", folder / "partly0") < 2e-5

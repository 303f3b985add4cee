"""Engines against each other: one run alone, under ZeRO 1, 2 and 3, and handed from one to another in its middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import load_learner

LIVES = Path(__file__).parent / "engine_lives.py"

Life = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the start model in m0 and, in whole/, six uninterrupted steps of the plain engine."""
    found = tmp_path_factory.mktemp("engines")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=129,  # of no even number of elements: its last part is padded
        vocab_size=97,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(found / "m0")
    run(1, {"zero_stage": 0, "model": str(found / "m0"), "steps": 6, "out": str(found / "whole")})
    return found


def run(ranks: int, *lives: Life) -> None:
    arguments = [json.dumps(life) for life in lives]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launcher, str(LIVES), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]


def steps(out: Path) -> list[Any]:
    return json.loads((out / "steps.json").read_text())


def farthest(one: Path, other: Path) -> float:
    """Largest difference of any weight."""
    mine, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    assert mine.keys() == theirs.keys()
    return max((mine[name].float() - theirs[name].float()).abs().max().item() for name in mine)


def test_zero_on_two_ranks_trains_as_one_process_does_and_hands_over_to_any_other(folder: Path) -> None:
    lives: list[Life] = []
    for stage in (1, 2, 3):
        first = {"zero_stage": stage, "model": str(folder / "m0"), "steps": 3, "out": str(folder / f"half{stage}")}
        lives.append(first)
    for stage, before in ((2, 1), (3, 2), (1, 3)):
        half = folder / f"half{before}"
        after = {"zero_stage": stage, "model": str(half), "state": str(half / "optimizer.pt"), "steps": 3}
        lives.append({**after, "out": str(folder / f"on{stage}")})
    run(2, *lives)
    half = folder / "half3"
    alone = {"zero_stage": 0, "model": str(half), "state": str(half / "optimizer.pt"), "steps": 3}
    run(1, {**alone, "out": str(folder / "on0")})

    expected = steps(folder / "whole")
    for stage in (1, 2, 3):
        assert steps(folder / f"half{stage}") == [pytest.approx(step, abs=1e-5) for step in expected[:3]]
    for stage in (0, 1, 2, 3):
        assert steps(folder / f"on{stage}") == [pytest.approx(step, abs=1e-5) for step in expected[3:]]
        assert farthest(folder / f"on{stage}", folder / "whole") < 1e-5


def test_a_refused_step_changes_nothing_on_any_rank_and_ranks_without_samples_take_part(folder: Path) -> None:
    whole = {"model": str(folder / "m0"), "steps": 4, "poisoned": [1]}
    run(
        2,
        *({**whole, "zero_stage": stage, "out": str(folder / f"refused{stage}")} for stage in (1, 3)),
        {"zero_stage": 3, "model": str(folder / "m0"), "steps": 2, "samples": 1, "out": str(folder / "few3")},
    )
    run(1, {"zero_stage": 0, "model": str(folder / "m0"), "steps": 2, "samples": 1, "out": str(folder / "few0")})
    expected = steps(folder / "whole")
    for stage in (1, 3):
        found = steps(folder / f"refused{stage}")
        assert found.pop(1) == "LogprobMismatch"
        assert found == [pytest.approx(step, abs=1e-5) for step in expected[:3]]
    assert steps(folder / "few3") == [pytest.approx(step, abs=1e-5) for step in steps(folder / "few0")]


def test_bfloat16_stays_near_float32_and_keeps_its_masters(folder: Path) -> None:
    half = {"dtype": "bfloat16", "steps": 3}
    run(2, {**half, "zero_stage": 3, "model": str(folder / "m0"), "out": str(folder / "b3")})
    state = str(folder / "b3" / "optimizer.pt")
    for stage, ranks in ((0, 1), (2, 2)):
        run(
            ranks,
            {
                **half,
                "zero_stage": stage,
                "model": str(folder / "b3"),
                "state": state,
                "out": str(folder / f"b{stage}"),
            },
        )
    expected = [step[0] for step in steps(folder / "whole")]
    assert [step[0] for step in steps(folder / "b3")] == pytest.approx(expected[:3], abs=1e-2)
    for stage in (0, 2):
        assert [step[0] for step in steps(folder / f"b{stage}")] == pytest.approx(expected[3:], abs=1e-2)
    assert load_file(folder / "b2" / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16


def test_a_state_of_another_model_or_format_is_refused(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "whole" / "optimizer.pt", weights_only=True)
    state["moments"]["model.unknown"] = state["moments"].popitem()[1]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(StartError, match="of another model"):
        load_learner(folder / "m0", TrainerSettings(), tmp_path / "other.pt")
    torch.save({"optimizer": {}}, tmp_path / "old.pt")
    with pytest.raises(StartError, match="format None"):
        load_learner(folder / "m0", TrainerSettings(), tmp_path / "old.pt")

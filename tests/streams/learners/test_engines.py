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
from fulgurite.streams.learners.engine import OptimizerState
from fulgurite.streams.learners.learner import load_learner
from tests.streams.learners import engine_lives
from tests.streams.learners.engine_lives import live

pytestmark = pytest.mark.timeout(600)  # processes under torchrun, which share two cores with other tests

Life = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All lives: alone, under two ranks, and alone again with what those left. Each has a folder; m0 is the start
    model, whole six steps alone."""
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
    config.initializer_range = 0.3  # where a token stands makes a difference to those after it
    LlamaForCausalLM(config).save_pretrained(found / "far")

    def life(name: str, zero_stage: int, steps: int, after: str = "m0", **more: Any) -> Life:
        state = {} if after == "m0" else {"state": str(found / after / "optimizer.pt")}
        place = {"model": str(found / after), "out": str(found / name)}
        return {"zero_stage": zero_stage, "steps": steps, **place, **state, **more}

    several = {"epochs": 2, "minibatches": 3}
    adapter = {"lora_rank": 4, "model": str(found / "m0"), "kl_coefficient": 0.1}
    far: dict[str, Any] = {"model": str(found / "far"), "scores": 2_000}
    run(
        1,
        life("whole", 0, 6),
        life("few0", 0, 2, samples=1),
        life("lora", 0, 6, settings=adapter),
        life("several0", 0, 2, settings=several),
        life("sum0", 0, 1, samples=600),
        life("far0", 0, 0, **far),
        life("far-half0", 0, 0, **far, dtype="bfloat16"),
    )
    run(
        2,
        *(life(f"half{stage}", stage, 3) for stage in (1, 2, 3)),
        *(life(f"on{stage}", stage, 3, after) for stage, after in ((2, "half1"), (3, "half2"), (1, "half3"))),
        *(life(f"refused{stage}", stage, 5, poisoned=[1], undecided=[2]) for stage in (1, 3)),
        life("few3", 3, 2, samples=1),
        life("several3", 3, 2, settings=several),
        life("lora2", 2, 3, settings=adapter),
        life("lora3", 3, 3, "lora2", settings=adapter),
        life("again3", 3, 2, settings={"activation_checkpointing": True}),
        life("b3", 3, 3, dtype="bfloat16"),
        life("b2", 2, 3, "b3", dtype="bfloat16"),
        *(life(f"sum{stage}", stage, 1, dtype="bfloat16", samples=600) for stage in (2, 3)),
        *(life(f"far-half{stage}", stage, 0, **far, dtype="bfloat16") for stage in (1, 3)),
        life("narrower", 2, 0, "whole", dtype="bfloat16"),
        life("wider", 2, 0, "b3"),
    )
    run(1, life("on0", 0, 3, "half3"), life("b0", 0, 3, "b3", dtype="bfloat16"))
    return found


def run(ranks: int, *lives: Life) -> None:
    """One after the other: most of a process is the import of torch. Alone, they need none of their own."""
    if ranks == 1:
        for each in lives:
            live(each)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launcher, engine_lives.__file__, *(json.dumps(life) for life in lives)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]


def steps(out: Path) -> list[Any]:
    return json.loads((out / "steps.json").read_text())


def farthest(one: Path, other: Path) -> float:
    """Largest difference of any weight."""
    mine, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    assert mine.keys() == theirs.keys()
    return max((mine[name].float() - theirs[name].float()).abs().max().item() for name in mine)


def test_zero_on_two_ranks_trains_as_one_process_does(folder: Path) -> None:
    for stage in (1, 2, 3):
        assert steps(folder / f"half{stage}") == [pytest.approx(step, abs=1e-5) for step in steps(folder / "whole")[:3]]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_is_handed_from_one_engine_to_another_in_its_middle(folder: Path, stage: int) -> None:
    assert steps(folder / f"on{stage}") == [pytest.approx(step, abs=1e-5) for step in steps(folder / "whole")[3:]]
    assert farthest(folder / f"on{stage}", folder / "whole") < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_a_refused_step_changes_nothing_on_any_rank(folder: Path, stage: int) -> None:
    found = steps(folder / f"refused{stage}")
    assert [found.pop(1), found.pop(1)] == ["LogprobMismatch"] * 2
    assert found == [pytest.approx(step, abs=1e-5) for step in steps(folder / "whole")[:3]]


def test_a_rank_without_samples_takes_part(folder: Path) -> None:
    assert steps(folder / "few3") == [pytest.approx(step, abs=1e-5) for step in steps(folder / "few0")]


def test_an_adapter_is_trained_the_same_and_handed_on(folder: Path) -> None:
    whole = steps(folder / "lora")
    assert steps(folder / "lora2") == [pytest.approx(step, abs=1e-5) for step in whole[:3]]
    assert steps(folder / "lora3") == [pytest.approx(step, abs=1e-5) for step in whole[3:]]
    theirs, ours = (load_file(folder / name / "adapter_model.safetensors") for name in ("lora3", "lora"))
    assert theirs.keys() == ours.keys()
    assert max((theirs[name] - ours[name]).abs().max().item() for name in ours) < 1e-5


def test_several_updates_a_window_are_the_same_on_all_ranks(folder: Path) -> None:
    assert steps(folder / "several3") == [pytest.approx(step, abs=1e-5) for step in steps(folder / "several0")]
    assert farthest(folder / "several3", folder / "several0") < 2e-5


def test_activations_computed_again_change_no_number(folder: Path) -> None:
    assert steps(folder / "again3") == [pytest.approx(step, abs=1e-5) for step in steps(folder / "whole")[:2]]


@pytest.mark.parametrize("stage", [2, 3])
def test_sums_over_many_micro_batches_are_float32_in_bfloat16_too(folder: Path, stage: int) -> None:
    """Added up in bfloat16 they are 1.5 % off here."""

    def gradient(name: str) -> torch.Tensor:
        moments = OptimizerState.load(folder / name / "optimizer.pt").moments
        return torch.cat([moments[key][0].flatten() for key in sorted(moments)])

    expected = gradient("sum0")
    assert (gradient(f"sum{stage}") - expected).norm() < 0.01 * expected.norm()


def test_bfloat16_stays_near_float32_and_keeps_its_masters(folder: Path) -> None:
    expected = [step[0] for step in steps(folder / "whole")]
    assert [step[0] for step in steps(folder / "b3")] == pytest.approx(expected[:3], abs=1e-2)
    for name in ("b0", "b2"):
        assert [step[0] for step in steps(folder / name)] == pytest.approx(expected[3:], abs=1e-2)
    assert load_file(folder / "b2" / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bfloat16_knows_where_a_token_stands_thousands_of_tokens_on(folder: Path, stage: int) -> None:
    """Frequencies of positions rounded to bfloat16 make another model of it, from some hundred tokens on."""
    exact, found = (torch.load(folder / name / "scores0.pt") for name in ("far0", f"far-half{stage}"))
    assert (found - exact)[1_000:].abs().mean() < 0.2


def test_another_type_on_the_way_costs_no_digit(folder: Path) -> None:
    """From float32 to ZeRO in bfloat16, and the other way."""
    masters = OptimizerState.load(folder / "narrower" / "optimizer.pt").masters
    before = load_file(folder / "whole" / "model.safetensors")
    assert {name.removeprefix("model."): tensor for name, tensor in masters.items()}.keys() == before.keys()
    assert all(torch.equal(tensor, before[name.removeprefix("model.")]) for name, tensor in masters.items())
    masters = OptimizerState.load(folder / "b3" / "optimizer.pt").masters
    after = load_file(folder / "wider" / "model.safetensors")
    assert all(torch.equal(tensor, after[name.removeprefix("model.")]) for name, tensor in masters.items())


@pytest.mark.parametrize("name", ["b0", "b2"])
def test_what_is_published_in_bfloat16_says_so_and_has_no_tensor_twice(folder: Path, name: str) -> None:
    assert (
        load_file(folder / name / "model.safetensors").keys() == load_file(folder / "m0" / "model.safetensors").keys()
    )
    assert json.loads((folder / name / "config.json").read_text())["dtype"] == "bfloat16"
    published = LlamaForCausalLM.from_pretrained(folder / name, dtype="auto")
    assert published.dtype is torch.bfloat16
    assert published.lm_head.weight is published.model.embed_tokens.weight


def test_a_state_of_another_model_or_format_is_refused(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "whole" / "optimizer.pt", weights_only=True)
    state["moments"]["model.unknown"] = state["moments"].popitem()[1]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(StartError, match="of another model"):
        load_learner(folder / "m0", TrainerSettings(), tmp_path / "other.pt")
    torch.save({"optimizer": {}}, tmp_path / "old.pt")
    with pytest.raises(StartError, match="format None"):
        load_learner(folder / "m0", TrainerSettings(), tmp_path / "old.pt")

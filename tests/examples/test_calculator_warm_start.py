"""The warm start: text survives its tokenizer, turns merge, and a folder is whole, reusable or untouched."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from examples.calculator import warm_start
from examples.calculator.demonstrations import Message, demonstration
from examples.calculator.model import END, train_tokenizer
from fulgurite.streams.policy_server.policy import load_policy


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(seed=1, conversations=500)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_text_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("ANS  12 ", " a  b~ [37] X", "CALC((37+56)*74)", "7" * 30, "\\\"'"):
        assert tokenizer.decode(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_second_prompt_begins_with_the_first_and_its_response(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(3)
    conversations = [conversation for _ in range(50) if len(conversation := demonstration(rng)) == 4]
    for conversation in conversations:
        first = prompt_ids(tokenizer, conversation[:1])
        encoded = tokenizer.backend_tokenizer.encode(conversation[1]["content"], add_special_tokens=False).ids
        response = [*encoded, tokenizer.backend_tokenizer.token_to_id(END)]
        second = prompt_ids(tokenizer, conversation[:3])
        assert second[: len(first) + len(response)] == first + response


def run(output: Path, *arguments: str) -> int:
    return warm_start.main(["--output", str(output), "--steps", "12", *arguments])


def test_makes_a_servable_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "warm"
    threads = torch.get_num_threads()
    assert run(output, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    reports = [json.loads(line.removeprefix("progress: ")) for line in lines if line.startswith("progress: ")]
    assert [report["step"] for report in reports] == [10, 12]
    assert reports[-1]["steps"] == 12
    assert 0 < reports[-1]["loss"] < 10
    assert load_policy(output).max_positions == 256
    assert [path.name for path in output.parent.iterdir()] == ["warm"]

    changed = (output / "model.safetensors").stat().st_mtime_ns
    assert run(output) == 0
    assert "there already" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == changed
    torch.set_num_threads(threads)


def test_the_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(tmp_path / name) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_never_overwrites_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert run(tmp_path / "mine") == 2
    assert "choose another --output" in capsys.readouterr().err
    assert run(tmp_path / "made") == 0
    assert run(tmp_path / "made", "--seed", "2") == 2
    assert "was made with" in capsys.readouterr().err

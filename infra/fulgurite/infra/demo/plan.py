"""What the demo is going to do: its sizes, its folders, and each service's command and settings.

A service is started as in production: `fulgurite <service>` with settings from file and environment. The policy is
served by the embedded server, which is such a service, or by vLLM's CPU build, which needs a model to start with: so it
starts after the warm start. Knows nothing of supervision or screens.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fulgurite.infra.ports import remembered_ports
from fulgurite.infra.vllm import vllm_command, vllm_environment
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import ENV_CONFIG, ENV_HOME, ENV_PREFIX, to_environment

EXAMPLE = "examples.calculator"
MIN_FREE_BYTES = 2 * 1024**3
"""Logs, tables and versions of one run are about 300 MB; Kafka and ClickHouse want room to breathe."""

EMBEDDED_SERVER = "policy-server"
SERVICES = ("coordinator", "materialiser", "assembler", EMBEDDED_SERVER, "follower", "gateway", "runner")
"""In the order in which they are started; each waits for those it needs."""

Serve = Literal["embedded", "vllm"]
"""Who serves the policy."""

VLLM_OPTIONS = (
    "--max-num-seqs=32",
    "--generation-config=vllm",  # no sampling defaults from the model's files: what is asked for is what is recorded
)
SERVED_SECONDS: dict[Serve, float] = {"embedded": 90.0, "vllm": 400.0}
"""How long a version may take from `resources` to the policy's server, its start included: vLLM imports for half a
minute, and the first start ever compiles."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything: chosen so that two cores need under five minutes."""

    steps: int = 36
    groups_per_step: int = 8
    group_size: int = 8
    eval_tasks: int = 512
    greedy_tasks: int = 128
    warm_start_steps: int = 350
    concurrency: int = 24
    seed: int = 1

    @property
    def held_out_rollouts(self) -> int:
        """Of one evaluation."""
        return self.eval_tasks + self.greedy_tasks


@dataclass(frozen=True, slots=True)
class Plan:
    """One demo in one folder. `root` is the checkout: the examples are imported from there."""

    data: Path
    root: Path
    sizes: Sizes
    run_id: str
    ports: dict[str, int]
    serve: Serve = "embedded"

    @property
    def services(self) -> tuple[str, ...]:
        """Those that are started at once."""
        return tuple(name for name in SERVICES if name != EMBEDDED_SERVER or self.serve == "embedded")

    @property
    def warm_start(self) -> Path:
        return self.data / "warm-start"

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    def warm_start_command(self) -> list[str]:
        return [
            sys.executable,
            *("-m", f"{EXAMPLE}.warm_start", "--output", str(self.warm_start)),
            *("--steps", str(self.sizes.warm_start_steps), "--seed", str(self.sizes.seed), "--json"),
        ]

    def service_command(self, service: str) -> list[str]:
        return [sys.executable, "-m", "fulgurite.infra", service]

    def vllm_command(self) -> list[str]:
        """vLLM on the warm start; the follower brings it what is newer. Raises StartError where it is not installed."""
        return vllm_command(self.root, self.warm_start, self.ports["policy_server"], VLLM_OPTIONS)

    def vllm_environment(self) -> dict[str, str]:
        """Without our PYTHONPATH: vLLM runs in an environment of its own."""
        environment = vllm_environment()
        environment.pop("PYTHONPATH", None)
        return environment

    def environment(self) -> dict[str, str]:
        """Of every child: ours without other FULGURITE_ settings than how to log, and this demo's."""
        kept = f"{ENV_PREFIX}LOG__"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ENV_PREFIX) or name.startswith(kept)
        }
        paths = [str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        home = {ENV_HOME: str(self.data), "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        inherited.pop(ENV_CONFIG, None)
        return inherited | quiet | home | to_environment(self.settings())

    def settings(self) -> dict[str, dict[str, Any]]:
        """What this demo sets beside Kafka and ClickHouse, whose addresses stand in the folder's fulgurite.toml."""
        at = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        return {
            "coordinator": {"port": self.ports["coordinator"], "url": at["coordinator"]},
            "gateway": {"port": self.ports["gateway"], "url": at["gateway"], "backend_url": at["policy_server"]},
            "policy_server": {"port": self.ports["policy_server"], "max_new_tokens": 48},
            "follower": {"servers": [at["policy_server"]]},
            # Few large inserts and transactions instead of many small ones: two cores are for agents and trainer.
            "materialiser": {"batch_wait_ms": 1_000},
            "assembler": {"commit_ms": 100},
            "runner": {"agent": f"{EXAMPLE}.agent:agent", "concurrency": self.sizes.concurrency},
            "trainer": {
                "run_id": self.run_id,
                "model": self.warm_start,
                "output": self.data / "policy",
                "tasks": f"{EXAMPLE}.tasks:train_task",
                "agent": "calculator",
                "steps": self.sizes.steps,
                "groups_per_step": self.sizes.groups_per_step,
                "group_size": self.sizes.group_size,
                "seed": self.sizes.seed,
            },
        }


def make_plan(data: Path, sizes: Sizes, run_id: str, serve: Serve = "embedded") -> Plan:
    """Raises StartError where the examples, or the vLLM that is asked for, are missing."""
    names = ("coordinator", "gateway", "policy_server")
    ports = remembered_ports(data / "service-ports.json", names, None, "the demo's services")
    plan = Plan(data.absolute(), find_examples(), sizes, run_id, ports, serve)
    if serve == "vllm":
        plan.vllm_command()  # told now, not after the warm start
    return plan


def check_folder(data: Path) -> None:
    """Before anything is written: raises StartError where the folder cannot be written or the disk is nearly full."""
    try:
        (data / "logs").mkdir(parents=True, exist_ok=True)
        (data / "logs" / "demo.log").open("a").close()
        free = shutil.disk_usage(data).free
    except OSError as error:
        raise StartError(f"cannot write in {data}: {error.strerror}; choose another folder with --data") from None
    if free < MIN_FREE_BYTES:
        needed = MIN_FREE_BYTES >> 30
        raise StartError(f"{data} has {free / 1024**3:.1f} GiB free; the demo needs {needed} GiB")


def find_examples() -> Path:
    """The folder that holds examples/calculator: the working directory, or the checkout this code lies in."""
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / "examples" / "calculator" / "agent.py").is_file():
            return folder
    raise StartError("examples/calculator is not here: run the demo from a checkout of the repository")

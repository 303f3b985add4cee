"""How fast the trainer is: its step beside TRL's and a plain loop's, what streaming costs, what asynchrony gains.

    make bench-train                                  all of it (about 20 minutes on 2 cores)
    make bench-train ARGS="--model 4b"                on a GPU: shapes of Qwen3-4B, bf16, sequences of up to 8k tokens
    make bench-train ARGS="--only step streaming"     5 minutes; other figures stay as they were

- step (train_contenders.py): the same window, model, device and settings through learner.step, TRL's GRPOTrainer and
  a padded Hugging Face loop, one after the other, each a process of its own. Trained tokens are those that were
  sampled. A contender's speed is that of its fastest step, in seconds of one processor core or by the wall on a GPU:
  what else the machine does only ever makes a step slower. Once with ragged lengths, once with equal ones, where there
  is no padding to save. On a CPU TRL computes the logits of every completion's position, on a GPU of the sampled ones
  only.
- prompts: our step with and without trainer.share_prompts, where prompts are three quarters of the longest sequence.
- streaming (train_streaming.py): a real trainer on the embedded broker.
- async (train_async.py): the demo with trainer.pacing_staleness 0 and 2, four runs of it.

Numbers must agree before they are compared: losses and gradient norms of every step, and the weights that come out, as
the difference of two updates relative to their size; the command fails where they do not.

Writes build/bench/train.json:
    trl_ratio, padded_ratio    our trained tokens a second over theirs, ragged lengths
    shared_prompts_ratio       trained tokens a second with long prompts computed once a group, over once a rollout
    peak_memory_ratio          our peak memory over TRL's, weights and optimizer included: below 1 is less
    streaming_share            Kafka to micro-batch, as share of a step
    publish_seconds            from the optimizer's update to the version's record in a consumer of `resources`
    async_speedup              wall time to the same reward in the demo, with agents that wait for their tool:
                               synchronous over asynchronous
    async_busy_speedup         the same with the demo's own agent, whose tool takes no time
"""

# ruff: noqa: T201 (its output is its purpose)
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from fulgurite.streams.learners.flops import peak_flops, work_of
from tests.bench.train_batch import MODEL, SIZES, Sizes, prepare, read_window

OUT: Final = Path("build/bench/train.json")
TRL_PYTHON: Final = Path(".venv-oracles/bin/python")
SPREADS: Final = {"ragged": 0.7, "equal": 0.0}
PARTS: Final = ("step", "streaming", "async")
PACKAGES: Final = ("schemas", "producers", "consumers", "streams", "infra")
START: Final = """
import runpy, sys, types

# One of the packages in TRL's environment is called tests, too.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = ["tests"]
runpy.run_module("tests.bench.train_contenders", run_name="__main__", alter_sys=True)
"""
UPDATE_TOLERANCE: Final = {"float32": 2e-2, "bfloat16": 0.5}
"""Of the difference of two updates relative to their size. AdamW's first updates are signs of gradients, so those that
are nothing but noise differ wholly; in half precision that is a good part of all."""
NORM_TOLERANCE: Final = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative, of losses and gradient norms."""

Figures = dict[str, float]


@dataclass(slots=True)
class Contender:
    """What its rounds came to."""

    seconds: list[float]
    """Of all timed steps: of the processor where the step runs on it, else by the wall."""
    losses: list[float]
    grad_norms: list[float]
    peak_bytes: int
    weights: dict[str, Tensor]


def run_contender(name: str, folder: Path, model: str, steps: int) -> Contender:
    """One round, in TRL's environment: it is this project's with TRL beside it."""
    out = folder / f"out-{name}"
    command = [str(TRL_PYTHON), "-c", START, name, str(folder), str(out)]
    paths = os.pathsep.join([*PACKAGES, ".", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [*command, "--sizes", model, "--steps", str(steps)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2_000:]}\n{done.stderr[-6_000:]}")
    found = json.loads((out / "result.json").read_text())
    weights = torch.load(out / "weights.pt", weights_only=True)
    shutil.rmtree(out)
    timed = found["seconds" if torch.cuda.is_available() else "cpu_seconds"][1:]
    return Contender(timed, found["losses"], found["grad_norms"], found["peak_bytes"], weights)


def compare_steps(folder: Path, model: str, rounds: int, steps: int) -> Figures:
    figures: Figures = {}
    sizes = SIZES[model]
    for lengths, spread in SPREADS.items():
        prepare(folder, sizes, spread)
        found: dict[str, Contender] = {}
        for _ in range(rounds):
            for name in ("ours", "trl", "padded"):
                latest = run_contender(name, folder, model, steps)
                if name in found:
                    latest.seconds += found[name].seconds
                    latest.peak_bytes = max(latest.peak_bytes, found[name].peak_bytes)
                found[name] = latest
        figures |= _show_steps(folder, sizes, lengths, found)
    return figures


def compare_prompts(folder: Path, model: str, steps: int) -> Figures:
    """What it saves that a group's prompt is computed once."""
    sizes = SIZES[model]
    prompt = sizes.row_tokens * 3 // 4
    longest = sizes.row_tokens - prompt
    long_prompts = replace(sizes, prompt_tokens=prompt, median_tokens=longest // 2, longest_tokens=longest)
    prepare(folder, long_prompts, SPREADS["ragged"])
    found = {name: run_contender(name, folder, model, steps) for name in ("ours", "unshared")}
    print(f"\nprompts of {prompt:,} tokens, answers of up to {longest:,}")
    for name, contender in found.items():
        print(f"  {name:8s} step {min(contender.seconds):8.3f} s   peak {contender.peak_bytes / 2**20:10,.0f} MiB")
    agree(folder, sizes, found)
    ours, unshared = found["ours"], found["unshared"]
    return {
        "shared_prompts_ratio": min(unshared.seconds) / min(ours.seconds),
        "shared_prompts_memory_ratio": ours.peak_bytes / unshared.peak_bytes,
    }


def _show_steps(folder: Path, sizes: Sizes, lengths: str, found: dict[str, Contender]) -> Figures:
    samples = read_window(folder)
    totals = [len(sample.token_ids) for sample in samples]
    sampled = sum(sum(sample.loss_mask) for sample in samples)
    rows = len(samples) * max(totals)
    print(
        f"\n{lengths} lengths: {len(samples)} sequences, {sum(totals):,} tokens, {sampled:,} of them trained on; "
        f"padded to the longest, {sum(totals) / rows:.0%} of the positions are tokens"
    )
    with torch.device("meta"):
        work = work_of(Qwen3ForCausalLM(Qwen3Config(**sizes.config)))
    flops = work.flops(totals, sampled)
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    for name, contender in found.items():
        best = min(contender.seconds)
        utilisation = f"   MFU {flops / best / peak:6.1%}" if peak else ""
        print(
            f"  {name:8s} {sampled / best:12,.0f} trained tokens/s   step {best:8.3f} s   "
            f"peak {contender.peak_bytes / 2**20:10,.0f} MiB{utilisation}",
            flush=True,
        )
    agree(folder, sizes, found)
    ours = min(found["ours"].seconds)
    suffix = "" if lengths == "ragged" else f"_{lengths}_lengths"
    figures = {
        f"trl_ratio{suffix}": min(found["trl"].seconds) / ours,
        f"padded_ratio{suffix}": min(found["padded"].seconds) / ours,
        f"peak_memory_ratio{suffix}": found["ours"].peak_bytes / found["trl"].peak_bytes,
        f"trained_tokens_per_second{suffix}": sampled / ours,
    }
    if peak:
        figures[f"mfu{suffix}"] = flops / ours / peak
    return figures


def agree(folder: Path, sizes: Sizes, found: dict[str, Contender]) -> None:
    """Prints how far the numbers of others are from ours. Ends the program where they are others."""
    ours = found["ours"]
    start = {
        name: tensor for path in (folder / MODEL).glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for name, other in found.items():
        if other is ours:
            continue
        loss = max(abs(a - b) / (abs(a) + 1e-2) for a, b in zip(ours.losses, other.losses, strict=True))
        norm = max(abs(a - b) / a for a, b in zip(ours.grad_norms, other.grad_norms, strict=True))
        update = update_difference(start, ours.weights, other.weights)
        print(
            f"  {name} and ours differ by {loss:.1e} in losses, {norm:.1e} in gradient norms, {update:.1e} in updates"
        )
        if not (max(loss, norm) < NORM_TOLERANCE[sizes.dtype] and update < UPDATE_TOLERANCE[sizes.dtype]):
            raise SystemExit(
                f"{name} computes something else than ours: losses {other.losses} and {ours.losses}, gradient norms "
                f"{other.grad_norms} and {ours.grad_norms}; its speed says nothing"
            )


def update_difference(start: dict[str, Tensor], ours: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """|ours - other| / |ours - start| over the weights that were written out."""
    names = [name for name in ours if name in start]  # a tied output layer is written once
    apart = sum((ours[name] - other[name]).double().square().sum().item() for name in names)
    moved = sum((ours[name] - start[name].float()).double().square().sum().item() for name in names)
    return (apart / moved) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(SIZES), default="tiny", help="0.6b and 4b need a GPU")
    parser.add_argument("--rounds", type=int, default=1, help="of the contenders, each a process of its own")
    parser.add_argument("--steps", type=int, default=4, help="of each round; the first warms up")
    parser.add_argument("--demo-steps", type=int, default=24, help="of each run of the demo, for async")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    options = parser.parse_args()
    if "step" in options.only and not TRL_PYTHON.exists():
        raise SystemExit(f"{TRL_PYTHON} is not there: make bench-train sets it up")
    figures: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    with tempfile.TemporaryDirectory(prefix="fulgurite-bench-") as name:
        folder = Path(name)
        if "step" in options.only:
            figures |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
            figures |= {"model": options.model} | compare_steps(folder, options.model, options.rounds, options.steps)
            figures |= compare_prompts(folder, options.model, options.steps)
        if "streaming" in options.only:
            from tests.bench.train_streaming import streaming

            figures |= streaming(folder, options.model)
        if "async" in options.only:
            from tests.bench.train_async import async_speedup

            figures |= async_speedup(folder, options.demo_steps)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")
    print()
    for name, value in figures.items():
        print(f"  {name:44s} {value if isinstance(value, str) else format(value, '12,.4f')}")
    print(f"\nwrote {OUT}")


if __name__ == "__main__":
    sys.exit(main())

"""Makes the policy that the demo starts from: supervised learning of a tiny, randomly initialised Llama on
demonstrations.

    python -m examples.calculator.warm_start --output DIR [--steps 500] [--seed 1] [--threads 1] [--json]

Honestly: the demonstrations are made by a program (demonstrations.py) that knows the answers and errs on purpose.
After it the policy speaks the protocol (`CALC(…)`, then `ANS …`), uses the tool in about half of its rollouts and
earns about 0.3 when it samples. It stands in for the pretrained model that a real run starts from, and takes a minute
instead of a month.

The folder is written completely or not at all (a sibling folder, then one rename) and holds `warm_start.json` with
what made it; run again with the same parameters it does nothing. With other parameters it refuses to overwrite.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from examples.calculator import demonstrations
from examples.calculator.demonstrations import Message, demonstration
from examples.calculator.model import END, PAD, new_model, train_tokenizer

MANIFEST: Final = "warm_start.json"
FORMAT: Final = 2
"""Another one where the model has another shape, or its files are others."""
LEARNING_RATE: Final = 3e-3
WARMUP_STEPS: Final = 20
DECAY_SHARE: Final = 0.4
"""Of the steps, at the end: the learning rate falls linearly to zero."""
_IGNORED = -100
"""The label of tokens that are not learned: cross_entropy's default."""

Progress = Callable[[int, int, float, float], None]
"""step, steps, loss, seconds left"""


class WarmStartError(Exception):
    """The folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on."""

    steps: int = 500
    batch: int = 48
    seed: int = 1

    def manifest(self) -> dict[str, Any]:
        vices = {name.lower(): getattr(demonstrations, name) for name in ("GUESS", "SLIP", "MISREAD")}
        return {"format": FORMAT, **asdict(self), "learning_rate": LEARNING_RATE, **vices}


def warm_start(output: Path, recipe: Recipe, progress: Progress) -> bool:
    """Writes the folder; False if it was there already. Raises WarmStartError if something else is there."""
    manifest = recipe.manifest()
    if output.exists():
        _check_same(output, manifest)
        return False
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed)
    model = new_model(tokenizer)
    train(model, tokenizer, recipe, progress)
    save(output, model, tokenizer, manifest)
    return True


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, progress: Progress) -> None:
    """Cross entropy on the assistant's tokens only, AdamW."""
    rng = Random(f"demonstrations {recipe.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe.steps))
    model.train()
    began = time.monotonic()
    for step in range(1, recipe.steps + 1):
        optimizer.zero_grad()
        loss = _backward(model, tokenizer, [demonstration(rng) for _ in range(recipe.batch)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == recipe.steps:
            left = (time.monotonic() - began) / step * (recipe.steps - step)
            progress(step, recipe.steps, loss, left)
    model.eval()


def _backward(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]) -> float:
    """Gradients of the mean over the assistants' tokens; gives it.

    Short and long conversations go in two forwards: less padding, an eighth less time, the same gradient.
    """
    rows = sorted((_tokens(tokenizer, conversation) for conversation in conversations), key=lambda row: len(row[0]))
    pad: int = tokenizer.encode(PAD, add_special_tokens=False)[0]
    learned = sum(label != _IGNORED for _, labels in rows for label in labels)
    total = 0.0
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        ids, labels = _padded(part, pad)
        # Padding stands on the right and attention is causal: what is before it never sees it, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        (loss / learned).backward()
        total += loss.item() / learned
    return total


def save(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, manifest: dict[str, Any]) -> None:
    """Complete or not there: a folder beside it, then one rename."""
    output.parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    half = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        (half / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        half.rename(output)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _check_same(output: Path, manifest: dict[str, Any]) -> None:
    path = output / MANIFEST
    if not path.is_file():
        raise WarmStartError(f"{output} exists and is no warm start ({MANIFEST} is missing): choose another --output")
    found = json.loads(path.read_text())
    if found != manifest:
        raise WarmStartError(
            f"{output} was made with {found}, now asked for {manifest}: remove it or choose another --output"
        )


def _learning_rate_factor(step: int, steps: int) -> float:
    rising = min(1.0, (step + 1) / WARMUP_STEPS)
    falling = min(1.0, (steps - step) / max(1.0, DECAY_SHARE * steps))
    return rising * falling


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both [conversations, longest], padded on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [_IGNORED] * (length - len(labels)) for _, labels in rows])
    return ids, labels


def _tokens(tokenizer: PreTrainedTokenizerFast, conversation: list[Message]) -> tuple[list[int], list[int]]:
    """A conversation's ids, and the same where the assistant speaks (its <|end|> included), _IGNORED elsewhere."""
    ids: list[int] = []
    labels: list[int] = []
    encode = tokenizer.backend_tokenizer.encode
    for message in conversation:
        head: list[int] = encode(f"<|{message['role']}|>", add_special_tokens=False).ids
        body: list[int] = encode(message["content"] + END, add_special_tokens=False).ids
        learned = message["role"] == "assistant"
        ids += head + body
        labels += [_IGNORED] * len(head) + (body if learned else [_IGNORED] * len(body))
    return ids, labels


def _print_text(step: int, steps: int, loss: float, seconds_left: float) -> None:
    if step % 50 == 0 or step == steps:
        print(f"warm start: step {step}/{steps}, loss {loss:.3f}, {seconds_left:.0f} s left", flush=True)


def _print_json(step: int, steps: int, loss: float, seconds_left: float) -> None:
    fields = {
        "phase": "warm_start",
        "step": step,
        "steps": steps,
        "loss": round(loss, 4),
        "seconds_left": round(seconds_left, 1),
    }
    print("progress: " + json.dumps(fields), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write, in Hugging Face format")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps, seed=options.seed)
    try:
        made = warm_start(options.output, recipe, _print_json if options.json else _print_text)
    except WarmStartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"warm start: {options.output} is {'ready' if made else 'there already'}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

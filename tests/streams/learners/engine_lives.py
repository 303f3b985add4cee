"""One life of a learner, alone or as one rank under torchrun: load, some steps, save. Run by test_engines.py.

    python engine_lives.py '{"zero_stage": 3, "model": …, "state": …, "steps": 3, "out": …, "poisoned": [1],
                             "undecided": [2], "settings": {"loss": "gspo"}, "scores": 2000}' …
Each argument is one life, one after the other in the same process; rank 0 writes out/steps.json and the model, and
out/left_out.json: of each step, by rank, the tokens trained on and the rollouts that no update was made of. "scores":
also out/scores0.pt (by rank), before the first step, log p of the tokens of a sequence of that length.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from fulgurite.schemas.errors import LogprobMismatch
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import BadStep, load_learner
from fulgurite.streams.learners.packing import pack
from fulgurite.streams.trainer.sample import Sample

VOCABULARY = 97


def samples(count: int = 13) -> list[Sample]:
    chance = random.Random(0)
    found: list[Sample] = []
    for number in range(count):
        length = chance.randint(5, 40)
        found.append(
            Sample(
                rollout_id=f"r{number}",
                token_ids=[chance.randrange(VOCABULARY) for _ in range(length)],
                loss_mask=[0, 0] + [1] * (length - 2),
                behaviour_logprobs=[-4.5] * length,
                versions=[0] * length,
                advantage=chance.uniform(-1, 1),
            )
        )
    return found


def live(life: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "zero_stage": life["zero_stage"],
        "dtype": life.get("dtype", "float32"),
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "micro_batch_tokens": 60,
        "importance_cap": 1_000.0,
        "correction": "truncate",
        "on_bad_step": "stop",
    }
    settings = TrainerSettings.model_validate(fields | life.get("settings", {}))
    state = Path(life["state"]) if life.get("state") else None
    learner = load_learner(Path(life["model"]), settings, state)
    out = Path(life["out"])
    out.mkdir(exist_ok=True)
    if "scores" in life:
        chance = random.Random(1)
        tokens = [chance.randrange(VOCABULARY) for _ in range(life["scores"])]
        mask, count = [0, *[1] * (len(tokens) - 1)], len(tokens)
        with torch.no_grad():
            scores, _ = learner.logprobs(pack([Sample("far", tokens, mask, [-4.5] * count, [0] * count, 1.0)]))
        torch.save(scores.float(), out / f"scores{learner.engine.rank}.pt")
    steps: list[Any] = []
    left_out: list[Any] = []
    for number in range(life["steps"]):
        # Version 0 is that of the samples, whose logprobs are made up: asked for, the comparison refuses the step.
        version = 0 if number in life.get("poisoned", []) else 1
        try:
            undecided = number in life.get("undecided", [])  # those samples tell nothing of version 1's sampler
            result = learner.step(samples(life.get("samples", 13)), version, is_mismatched=undecided)
            steps.append(
                [
                    result.loss,
                    result.grad_norm,
                    result.tokens,
                    result.metrics["actor/entropy"],
                    result.metrics["actor/pg_loss"],
                ]
            )
            left_out.append(learner.engine.gather([result.tokens, *sorted(result.left_out)]))
        except (BadStep, LogprobMismatch) as error:
            steps.append(type(error).__name__)
    learner.save_weights(out)
    learner.save_state(out / "optimizer.pt")
    if learner.engine.rank == 0:
        (out / "steps.json").write_text(json.dumps(steps))
        (out / "left_out.json").write_text(json.dumps(left_out))
    learner.engine.gather(None)  # the next life may begin with what rank 0 has written


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        live(json.loads(argument))

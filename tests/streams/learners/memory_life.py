"""A process that prints by how many MiB a step's peak of resident memory grows from one sequence to six:

python -m tests.streams.learners.memory_life FOLDER VOCABULARY …
"""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import load_learner
from fulgurite.streams.trainer.sample import Sample

SEQUENCES = 6
SAMPLED = 256


def growth_mib(folder: Path, vocabulary: int) -> float:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads)).save_pretrained(folder)
    draw = random.Random(0)
    samples = [
        Sample(
            rollout_id=f"r{number}",
            token_ids=[draw.randrange(vocabulary) for _ in range(8 + SAMPLED)],
            loss_mask=[0] * 8 + [1] * SAMPLED,
            behaviour_logprobs=[-10.0] * (8 + SAMPLED),
            versions=[-1] * (8 + SAMPLED),
            advantage=draw.gauss(0, 1),
        )
        for number in range(SEQUENCES)
    ]
    learner = load_learner(folder, TrainerSettings(run_id="r", model=folder, correction="none"))
    learner.step(samples[:1], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner.step(samples, 0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    for each in sys.argv[2:]:
        sys.stdout.write(f"growth {growth_mib(Path(sys.argv[1]) / each, int(each))}\n")

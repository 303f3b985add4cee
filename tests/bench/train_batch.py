"""What every contender of `make bench-train` is given: a model with random weights, one window of ragged rollouts.

    sizes ─► folder/model (Hugging Face), folder/window.json (tokens, masks, log p when sampled, advantages)

Rollouts are those of an agent with a tool: a prompt, then sampled turns with the tool's answers between them. Lengths
of what follows the prompt are lognormal (deviation `spread` of the logarithm), about as those of sampled answers are,
cut at the longest; with spread 0 all are the longest. Prompts have one length, so that nothing of the difference is
theirs. The log p when sampled is the model's own with noise of 0.2 nats, so that ratios leave the clip as they do a few
versions later, and the advantages are what rewards of 0 and 1 in groups give.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.learner import load_learner
from fulgurite.streams.learners.packing import pack
from fulgurite.streams.objectives.advantages import group_advantages
from fulgurite.streams.trainer.sample import Sample

MODEL: Final = "model"
WINDOW: Final = "window.json"
GROUP: Final = 8
TOOL_TOKENS: Final = 12
"""Of each answer of the tool."""
TURN_TOKENS: Final = 48
"""Sampled, most of them, between two answers."""
NOISE_NATS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model, and of a window for it."""

    config: dict[str, Any]
    groups: int
    prompt_tokens: int
    median_tokens: int
    """After the prompt."""
    longest_tokens: int
    """The same."""
    rows: int
    """Sequences a padded micro-batch has; a packed one has as many positions."""
    dtype: str = "float32"
    activation_checkpointing: bool = False

    @property
    def row_tokens(self) -> int:
        return self.prompt_tokens + self.longest_tokens

    @property
    def micro_batch_tokens(self) -> int:
        return self.rows * self.row_tokens


def _qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, head: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "head_dim": head,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }


SIZES: Final[dict[str, Sizes]] = {
    # For two cores: a step of some seconds.
    "tiny": Sizes(_qwen3(192, 3, 3, 1, 576, 8_192, 64), 4, 32, 96, 448, 4),
    # The shapes of Qwen3-0.6B and Qwen3-4B, for one H200: 8k tokens at the longest, 16k positions a micro-batch.
    "0.6b": Sizes(_qwen3(1024, 28, 16, 8, 3072, 151_936, 128), 8, 512, 2_048, 7_680, 2, "bfloat16", True),
    "4b": Sizes(_qwen3(2560, 36, 32, 8, 9728, 151_936, 128), 4, 512, 2_048, 7_680, 2, "bfloat16", True),
}


def prepare(folder: Path, sizes: Sizes, spread: float, seed: int = 0) -> None:
    """Writes both. The model is written once; windows of another spread may be made beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MODEL).exists():
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = Qwen3ForCausalLM(Qwen3Config(**sizes.config))
        model.save_pretrained(folder / MODEL)
        _tokenizer().save_pretrained(folder / MODEL)
        del model
    samples = _rollouts(sizes, spread, random.Random(seed))
    _sample_logprobs(folder / MODEL, samples, sizes, seed)
    (folder / WINDOW).write_text(json.dumps([asdict(sample) for sample in samples]))


def read_window(folder: Path) -> list[Sample]:
    return [Sample(**fields) for fields in json.loads((folder / WINDOW).read_text())]


def settings_for(sizes: Sizes, folder: Path) -> TrainerSettings:
    """DAPO's loss without KL, AdamW without decay: what all contenders can do alike."""
    return TrainerSettings(
        model=folder / MODEL,
        loss="dapo",
        learning_rate=1e-4,
        warmup_steps=0,
        max_grad_norm=1.0,
        micro_batch_tokens=sizes.micro_batch_tokens,
        activation_checkpointing=sizes.activation_checkpointing,
        dtype="bfloat16" if sizes.dtype == "bfloat16" else "float32",
        threads=1 if not torch.cuda.is_available() else 8,
    )


def _rollouts(sizes: Sizes, spread: float, chance: random.Random) -> list[Sample]:
    samples: list[Sample] = []
    vocabulary = sizes.config["vocab_size"]
    for group in range(sizes.groups):
        prompt = [chance.randrange(3, vocabulary) for _ in range(sizes.prompt_tokens)]
        rewards = [float(chance.random() < 0.5) for _ in range(GROUP - 2)] + [0.0, 1.0]
        for member, advantage in enumerate(group_advantages(rewards)):
            drawn = round(sizes.median_tokens * chance.lognormvariate(0.0, spread)) if spread else sizes.longest_tokens
            length = max(TURN_TOKENS // 2, min(sizes.longest_tokens, drawn))
            turn = TURN_TOKENS + TOOL_TOKENS
            mask = [int(position % turn < TURN_TOKENS) for position in range(length)]
            total = sizes.prompt_tokens + length
            samples.append(
                Sample(
                    rollout_id=f"bench-g{group}-r{member}",
                    token_ids=prompt + [chance.randrange(3, vocabulary) for _ in range(length)],
                    loss_mask=[0] * sizes.prompt_tokens + mask,
                    behaviour_logprobs=[0.0] * total,
                    versions=[-1] * sizes.prompt_tokens + [1 if sampled else -1 for sampled in mask],
                    advantage=advantage,
                )
            )
    return samples


def _sample_logprobs(model: Path, samples: list[Sample], sizes: Sizes, seed: int) -> None:
    learner = load_learner(model, settings_for(sizes, model.parent))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for sample in samples:
            found = learner.logprobs(pack([sample]))[0].cpu()
            noisy = (found + NOISE_NATS * torch.randn(len(found), generator=generator)).clamp(max=-1e-3)
            sampled = (position for position, mask in enumerate(sample.loss_mask) if mask)
            for position, value in zip(sampled, noisy.tolist(), strict=True):
                sample.behaviour_logprobs[position] = value


def _tokenizer() -> PreTrainedTokenizerFast:
    """TRL will not begin without one; no text is ever tokenised."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )

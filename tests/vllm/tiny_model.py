"""A tiny Llama with random weights, its tokenizer and its chat template, in folders; and the oracle, transformers' own
forward in fp32.

The tokenizer is a byte-level BPE. A model with random weights samples any byte sequence, most of them no UTF-8 and not
the way the tokenizer would write the same text: for such responses decode and encode is never the identity, which a
trained model shows rarely. The template knows tools in the manner of Hermes models, which vLLM has a parser for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fulgurite.schemas.event import VersionSpan

MAX_POSITIONS: Final = 2_048
HIDDEN: Final = 128
"""In 4 heads: 32 is the smallest that vLLM's attention on CPU takes; a smaller one kills its engine."""
LAYERS: Final = 2
RANK, ALPHA = 4, 8
PAD, END = "<|pad|>", "<|end|>"
SPECIAL: Final = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHAT_TEMPLATE: Final = (
    "{%- if tools -%}{{- '<|system|>' -}}"
    "{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] or '') -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' -}}"
    "{%- endfor -%}{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_CORPUS: Final = (
    "the policy answers with words and numbers, the tool answers with numbers, and what was said is said again",
    '{"name": "calculate", "arguments": {"expression": "12 + 34"}}',
    "<tool_call> </tool_call> why not, now and then: 0123456789 (a+b)*c",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Some hundred tokens: every byte, and merges of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(folder: Path, seed: int) -> Path:
    """Random weights. Two seeds give models that differ by several nats."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.1,
        tie_word_embeddings=False,  # tied, vLLM on CPU goes on with the old output layer after a reload
        bos_token_id=None,
        **ids,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter in peft's format, large enough to change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.3
            weights[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.3
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    return folder


class Oracle:
    """What a model really gives a token: one forward over the whole sequence, no cache, no batch."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval()
        if adapter:
            self._merge(load_file(adapter / "adapter_model.safetensors"))

    @torch.inference_mode()
    def _merge(self, weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.endswith(".lora_A.weight")]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_b = weights[name.replace("lora_A", "lora_B")]
            self._model.get_submodule(module).weight += lora_b @ weights[name] * (ALPHA / RANK)

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        ids = torch.tensor([[*prompt, *response]])
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(list(response)).unsqueeze(1)
        return torch.log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1).tolist()


def worst_error(
    oracles: dict[int, Oracle],
    prompt: Sequence[int],
    response: Sequence[int],
    logprobs: Sequence[float],
    versions: Sequence[VersionSpan],
) -> float:
    """The largest difference of a logprob to what the version that its span names gives the token."""
    assert len(response) == len(logprobs)
    assert sum(span.end - span.start for span in versions) == len(response)
    worst = 0.0
    for span in versions:
        expected = oracles[span.version].logprobs(prompt, response)
        worst = max(worst, *(abs(expected[at] - logprobs[at]) for at in range(span.start, span.end)))
    return worst

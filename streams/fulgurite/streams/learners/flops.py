"""What a step costs in floating-point operations, and what share of the device's best that was. Pure, no torch.

Counted as the field does (PaLM, arXiv:2204.02311, appendix B): 2 for each weight a token is multiplied with, as much
twice again for the backward pass; attention by what it must look at, half a square a sequence; nothing for what is
computed a second time (activation checkpointing, chunks of the head). The output layer is counted for sampled tokens
only: no other position's logits are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

PEAK_BF16_FLOPS: Final[Mapping[str, float]] = MappingProxyType(
    {
        # Dense, without sparsity, by NVIDIA's data sheets; the first that the device's name contains.
        "B200": 2.25e15,
        "H200": 9.89e14,
        "H100 PCIe": 7.56e14,
        "H100": 9.89e14,
        "A100": 3.12e14,
        "L40S": 3.62e14,
        "L4": 1.21e14,
        "A10": 1.25e14,
    }
)


def model_flops(config: Mapping[str, Any], lengths: Sequence[int], sampled: int, tokens: int | None = None) -> float:
    """Forward and backward over sequences of these lengths, `sampled` of whose tokens are scored. `config`: the text
    model's, of Llama's shape (dense, gated). `tokens`: how many go through its layers, where prompts in common do so
    once; None: all.

    >>> model_flops({"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4,
    ...              "vocab_size": 8}, [3], 2)
    1020.0
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    through = sum(lengths) if tokens is None else tokens
    forward = 2.0 * layers * projections * through + 2.0 * hidden * config["vocab_size"] * sampled
    forward += 2.0 * layers * heads * head_dim * sum(length * length for length in lengths)
    return 3.0 * forward


def peak_flops(device_name: str) -> float | None:
    """The best of the device in bf16; None for one that is not known.

    >>> peak_flops("NVIDIA H200"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    return next((flops for name, flops in PEAK_BF16_FLOPS.items() if name in device_name), None)

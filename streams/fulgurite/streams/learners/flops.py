"""What a step costs in floating-point operations, and what share of the device's best that was.

Counted as the field does (PaLM, arXiv:2204.02311, appendix B), from the model's own weights: for each matrix a token is
multiplied with 2 forward, 2 backward for the token's gradient, and 2 more for the matrix' own where it is trained: with
LoRA the frozen ones have none. Of experts the active ones. Attention by what it must look at, half a square a sequence.
The output layer for sampled tokens only: no other position's logits are made. Nothing for what is computed a second
time (activation checkpointing, chunks of the head) or without a gradient (a KL reference, the look before several
updates), and nothing for lookups, norms and biases.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor, nn

from fulgurite.streams.learners.launch import launched_rank

logger = logging.getLogger(__name__)

PEAK_BF16_FLOPS: Final[Mapping[str, float]] = MappingProxyType(
    {
        # Dense, without sparsity, by NVIDIA's data sheets. Whole names: an L40 is no L4, and a part of a device (MIG),
        # which has the device's name and more, has not its peak.
        "B200": 2.25e15,
        "H200": 9.89e14,
        "H100 80GB HBM3": 9.89e14,
        "H100 PCIe": 7.56e14,
        "A100-SXM4-40GB": 3.12e14,
        "A100-SXM4-80GB": 3.12e14,
        "A100-PCIE-40GB": 3.12e14,
        "A100 80GB PCIe": 3.12e14,
        "L40S": 3.62e14,
        "L40": 1.81e14,
        "L4": 1.21e14,
        "A10": 1.25e14,
    }
)
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")


@dataclass(frozen=True, slots=True)
class Work:
    """A model's operations, forward and backward."""

    token: float
    """For a token that goes through the layers."""
    scored: float
    """For one whose logits are made."""
    pair: float
    """For two tokens of which one attends to the other, in all layers."""

    def flops(self, lengths: Sequence[int], sampled: int, tokens: int | None = None) -> float:
        """Of sequences of these lengths, `sampled` of whose tokens are scored. `tokens`: how many go through the
        layers, where prompts in common do so once; None: all.

        >>> Work(token=240.0, scored=96.0, pair=24.0).flops([3], 2)
        1020.0
        """
        through = sum(lengths) if tokens is None else tokens
        pairs = sum(length * length for length in lengths) / 2
        return self.token * through + self.scored * sampled + self.pair * pairs


@dataclass(frozen=True, slots=True)
class Meter:
    """Of a model on a device."""

    work: Work
    peak: float
    """The device's, in operations a second."""


def meter_of(model: Any, device_name: str | None) -> Meter | None:
    """`device_name`: a GPU's, None without one. None, and said once in the log, where a share would be a guess."""
    if device_name is None:
        return None
    peak = peak_flops(device_name)
    if peak is None:
        reason = f"what a {device_name} can do at best is not known here"
    else:
        try:
            return Meter(work_of(model), peak)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"the operations of {type(model).__name__} cannot be counted: {error}"
    if launched_rank() == 0:
        logger.warning("no perf/mfu/actor among this run's metrics: %s", reason)
    return None


def work_of(model: Any) -> Work:
    """Of a causal language model as transformers has them, as its weights are frozen or trained now and before any
    engine has taken them apart. Raises what a model that is otherwise makes of it, ValueError at best."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    share = _active_share(config)
    ours = {id(each) for each in head.modules()}
    token = 0.0
    # Of a model that also sees, the part that reads text.
    for path, module in model.get_decoder().named_modules():
        if id(module) in ours:
            continue
        for weight in _matrices(module):
            is_expert = "experts" in path.split(".") or weight.dim() > 2
            if is_expert and share is None:
                raise ValueError(f"{path} are experts, and config.json does not say how many of them are active")
            token += _operations(weight) * ((share or 1.0) if is_expert else 1.0)
    scored = sum(_operations(weight) for module in head.modules() for weight in _matrices(module))
    if not token or not scored:
        raise ValueError("no weights are found in its layers, or none in its output layer")
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Work(token, scored, 12.0 * width * config.num_hidden_layers)


def peak_flops(device_name: str) -> float | None:
    """The best of the device in bf16; None for one that is not known.

    >>> peak_flops("NVIDIA H200"), peak_flops("NVIDIA H200 MIG 1g.18gb"), peak_flops("cpu")
    (989000000000000.0, None, None)
    """
    return PEAK_BF16_FLOPS.get(device_name.removeprefix("NVIDIA "))


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    """The module's own that tokens are multiplied with. Experts may be several in one tensor."""
    if isinstance(module, nn.Embedding):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1 and "bias" not in name:
            yield parameter


def _operations(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def _active_share(config: Any) -> float | None:
    """Of the experts, those that a token goes through. None where the config names none."""
    experts = next((count for name in _EXPERTS if (count := getattr(config, name, None))), None)
    active = next((count for name in _ACTIVE if (count := getattr(config, name, None))), None)
    return active / experts if experts and active else None

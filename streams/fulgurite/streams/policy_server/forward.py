"""One forward pass of a model over a prepared cache: any decoder of transformers, and Llama in half the time.

A model of this server's size spends its time on calling operations, not in them. Measured on a busy machine, CPU of a
decoding step of the calculator's model: transformers' Llama 3.4 ms for one row and 4.5 ms for 16, the one below 1.5 and
2.5 ms. That is what lets two cores serve, train and run everything else. Both have one interface, and a policy is
compared with transformers' plain forward before it is served. Knows nothing of requests or sampling.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from fulgurite.streams.policy_server.cache import KeyValueCache


class Forward(Protocol):
    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, cache: KeyValueCache
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of the token at index `last` of each row.

        ids and positions are [rows, length], mask is boolean [rows or 1, 1, length, what is attended to].
        """
        ...


def forward_of(model: PreTrainedModel) -> Forward:
    """The quickest one that fits the model."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    static = rope.get("rope_type", "default") in ("default", "linear", "llama3")
    if type(model).__name__ == "LlamaForCausalLM" and config.hidden_act == "silu" and static:
        return LlamaForward(model)
    return AnyForward(model)


class AnyForward:
    """transformers' own forward, with our cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, cache: KeyValueCache
    ) -> torch.Tensor:
        # Only the columns that some row needs: logits of a whole prompt would be vocabulary times its length.
        columns, column_of_row = last.unique(return_inverse=True)
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=columns,
        )
        return output.logits[torch.arange(len(ids)), column_of_row]


class LlamaForward:
    """Llama with its projections fused, residuals added by the matrix product, and no repeated keys."""

    def __init__(self, model: PreTrainedModel) -> None:
        inner: Any = model
        config = inner.config
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._epsilon: float = config.rms_norm_eps
        self._rotary: Any = inner.model.rotary_emb
        self._cosines = self._sines = torch.empty(0, self._width)
        self._embedding: torch.Tensor = inner.model.embed_tokens.weight
        self._norm: torch.Tensor = inner.model.norm.weight
        self._head: Any = inner.lm_head
        self._layers = [_Layer(layer) for layer in inner.model.layers]

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, cache: KeyValueCache
    ) -> torch.Tensor:
        rows, length = ids.shape
        groups = self._heads // self._kv_heads
        cosines, sines = self._rotation(positions)
        # The query heads that share a key head become query positions of it: [rows, key heads, groups * length, width].
        mask = mask.repeat(1, 1, groups, 1) if length > 1 else mask
        state = functional.embedding(ids, self._embedding).flatten(0, 1)
        for index, layer in enumerate(self._layers):
            normed = functional.rms_norm(state, (state.shape[-1],), layer.norm_attention, self._epsilon)
            mixed = functional.linear(normed, layer.qkv, layer.qkv_bias).view(rows, length, -1, self._width)
            rotated = self._rotate(mixed[:, :, : self._heads + self._kv_heads], cosines, sines)
            queries = rotated[:, :, : self._heads].transpose(1, 2)
            keys, values = cache.update(
                rotated[:, :, self._heads :].transpose(1, 2),
                mixed[:, :, self._heads + self._kv_heads :].transpose(1, 2),
                index,
            )
            queries = queries.reshape(rows, self._kv_heads, groups * length, self._width)
            attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            attended = attended.view(rows, self._heads, length, self._width).transpose(1, 2)
            state = layer.add_output(state, attended.reshape(rows * length, -1))
            normed = functional.rms_norm(state, (state.shape[-1],), layer.norm_mlp, self._epsilon)
            gate, up = functional.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            state = layer.add_down(state, functional.silu(gate) * up)
        state = state[torch.arange(rows) * length + last]
        normed = functional.rms_norm(state, (state.shape[-1],), self._norm, self._epsilon)
        return functional.linear(normed, self._head.weight, self._head.bias)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [rows, length, 1, width], from a table that grows with the positions in use."""
        needed = int(positions.max()) + 1
        if needed > len(self._cosines):
            cosines, sines = self._rotary(self._embedding, torch.arange(2 * needed)[None])
            half = self._width // 2
            # rotate_half negates the first half of its output; here the sign is in the table.
            self._cosines, self._sines = cosines[0], torch.cat([-sines[0, :, :half], sines[0, :, half:]], dim=-1)
        return self._cosines[positions][:, :, None], self._sines[positions][:, :, None]

    def _rotate(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        swapped = heads.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        return torch.addcmul(heads * cosines, swapped, sines)


class _Layer:
    """A decoder layer's weights, projections of the same input fused into one matrix.

    The model's own parameters become views of the fused ones, so that nothing is held twice.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm_attention: torch.Tensor = layer.input_layernorm.weight
        self.norm_mlp: torch.Tensor = layer.post_attention_layernorm.weight
        self.qkv, self.qkv_bias = _fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up, self.gate_up_bias = _fuse([mlp.gate_proj, mlp.up_proj])
        self._output, self._down = attention.o_proj, mlp.down_proj

    def add_output(self, state: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return _add_linear(state, attended, self._output)

    def add_down(self, state: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        return _add_linear(state, activated, self._down)


def _fuse(projections: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    fused = torch.cat([projection.weight for projection in projections])
    parts = fused.split([len(projection.weight) for projection in projections])
    for projection, part in zip(projections, parts, strict=True):
        projection.weight.data = part
    if projections[0].bias is None:
        return fused, None
    return fused, torch.cat([projection.bias for projection in projections])


def _add_linear(state: torch.Tensor, given: torch.Tensor, projection: Any) -> torch.Tensor:
    added = torch.addmm(state, given, projection.weight.t())
    return added if projection.bias is None else added + projection.bias

"""A causal language model that scores packed sequences: what every learner trains.

Promises: the scores are those of the plain model on each sequence alone. A model of which that is not so is refused
when it is made, not trained wrongly: one whose logits are more than its output layer of its last hidden states (soft
caps, scales), whose attention is not the plain one (sinks, caps), whose layers carry something from token to token past
the attention (Mamba and its like), or whose positions depend on how long others are. Does not know what the scores are
for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners import adapter
from fulgurite.streams.learners.adapter import is_adapter
from fulgurite.streams.learners.attention import NAME, layout_of
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.scoring import token_scores

CHUNK_BYTES: Final = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Of the float32 logits that exist at once: what a processor's cache holds; what a GPU is busy with."""
LEAST_CHUNK_TOKENS: Final = 64
MOST_CHUNK_TOKENS: Final = 16_384
_PROBE_TOKENS: Final = 8
_PROBE_TOLERANCE: Final = 1e-2
"""Half precision rounds; a soft cap or a scale differs by far more."""
_PROBE_LENGTHS: Final = (7, 6)
_LEAK_TOLERANCE: Final = 1e-3
"""Of the largest logit: what another attention's rounding makes of it …"""
_LEAK_TOLERANCE_BFLOAT16: Final = 0.1
"""… and in half precision, where it may choose other experts; what leaks makes as much as the logits themselves."""
_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})
"""Kinds of rotary positions that are others where a longer sequence lies beside."""


class Policy(nn.Module):
    """Wraps a Hugging Face model; `model` is that model, to be saved as it is."""

    def __init__(self, model: PreTrainedModel, chunk_tokens: int | None = None) -> None:
        """`chunk_tokens`: positions whose logits exist at once; None: by the device and the vocabulary."""
        super().__init__()
        self.model = model
        self._chunk_tokens = chunk_tokens
        model.eval()  # no dropout: the sampler had none, and its logprobs are compared with ours
        self._refuse_positions_by_length()
        try:
            self._refuse_other_heads()
            self._refuse_leaks()
            self.unreached = self._freeze_unreached()
            """Names of parts of the model that text never comes to, such as a vision tower: they are not trained."""
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise SettingsError(
                f"{type(model).__name__} cannot score packed sequences: {error!r}; such models cannot be trained here"
            ) from error

    def forward(
        self, batch: PackedBatch, *, temperature: float = 1.0, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[M] log p of each sampled token under the current policy, and the entropy of where it came from."""
        hidden = self._hidden(batch.token_ids, batch.position_ids, batch.layout)
        return token_scores(
            hidden[batch.predicting],
            self._head,
            batch.targets,
            temperature=temperature,
            chunk_tokens=self._chunk_tokens or self._fitting_chunk(hidden.device),
            entropy_gradient=entropy_gradient,
        )

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """What servers load: the model, or its adapter where it has one; not its generation_config.json, which is the
        start model's own file as it is there. `dtype`: what numbers are written in; None: in what they are."""
        if self.has_adapter:
            mine = {n.removeprefix("model."): p.detach() for n, p in self.named_parameters() if p.requires_grad}
            adapter.save(self.model, folder, mine if dtype is None else self._in_type(mine, dtype))
            return
        # transformers writes one that it made itself, and refuses some that it has read: a temperature alone.
        self.model.generation_config = GenerationConfig()
        if dtype is None:
            self.model.save_pretrained(folder)
        else:
            # A tied weight would not be seen to be one: its copy is another tensor.
            tied = self.model.all_tied_weights_keys
            own = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}
            self.model.save_pretrained(folder, state_dict=self._in_type(own, dtype))
            _name_type(folder / "config.json", dtype)
        (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def is_kept_in_float32(self, name: str) -> bool:
        """Whether the model wants this tensor of its own so, whatever it is trained in: the biases by which experts are
        chosen, above all. Rounded, a server would choose others than were trained."""
        parts: Iterable[str] = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        return any(re.search(rf"(^|\.){part}(\.|$)", name) for part in parts)

    def _in_type(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        types = {name: torch.float32 if self.is_kept_in_float32(name) else dtype for name in tensors}
        return {name: each.to(types[name]) if each.is_floating_point() else each for name, each in tensors.items()}

    def _fitting_chunk(self, device: torch.device) -> int:
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        fitting = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
        return max(LEAST_CHUNK_TOKENS, min(MOST_CHUNK_TOKENS, fitting))

    def _hidden(self, token_ids: Tensor, position_ids: Tensor, layout: Any) -> Tensor:
        body: Any = self.model.base_model
        answer = body(
            input_ids=token_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, layout=layout
        )
        return answer.last_hidden_state.squeeze(0)

    def _head(self, hidden: Tensor) -> Tensor:
        head: Any = self.model.get_output_embeddings()
        return head(hidden)

    def checkpoint_activations(self) -> None:
        """From here on a layer's activations are not kept for the backward pass but computed again: memory for a third
        more time. Raises SettingsError for a model whose layers drop out: they know it by the same flag."""
        dropping = {name: value for name, value in self.model.config.to_dict().items() if "drop" in name and value}
        if dropping:
            raise SettingsError(
                f"trainer.activation_checkpointing: {type(self.model).__name__} drops out ({dropping}); set it to 0 in "
                "the model's config.json, the sampler never did"
            )
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the layer alone, not of what is in it

    def _refuse_positions_by_length(self) -> None:
        rope: Any = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        # Some models have one for each kind of layer.
        kinds = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, Mapping)}
        if found := kinds & _BY_LENGTH:
            raise SettingsError(
                f"{type(self.model).__name__}: its rotary positions ({', '.join(sorted(found))}) depend on the longest "
                "sequence in a pass, and several are packed into one; such models cannot be trained here"
            )

    @torch.no_grad()
    def _refuse_other_heads(self) -> None:
        device = next(self.model.parameters()).device
        size = min(_PROBE_TOKENS, int(self.model.config.get_text_config().vocab_size))
        token_ids = torch.arange(size, device=device)
        layout = layout_of([size]).to(device)
        ours = self._head(self._hidden(token_ids, token_ids, layout)).float()
        whole: Any = self.model
        answer = whole(
            input_ids=token_ids.unsqueeze(0), position_ids=token_ids.unsqueeze(0), use_cache=False, layout=layout
        )
        scale = max(1.0, ours.abs().max().item())
        worst = (answer.logits.squeeze(0).float() - ours).abs().max().item()
        if not worst <= _PROBE_TOLERANCE * scale:
            raise SettingsError(
                f"{type(self.model).__name__}: its logits are not its output layer of its hidden states (they differ "
                f"by {worst:.3g}: a soft cap or a scale in its config?); such models cannot be trained here"
            )

    def _freeze_unreached(self) -> list[str]:
        """Such a part's parameters have no gradient; weight decay alone would change them."""
        base: Any = self.model.base_model
        called: set[nn.Module] = set()
        watched = [each.register_forward_hook(lambda module, *_: called.add(module)) for each in base.modules()]
        try:
            scores = self._probe()
        finally:
            for watch in watched:
                watch.remove()
        found: list[str] = []
        for name, part in base.named_children():
            parameters = [each for each in part.parameters() if each.requires_grad]
            if not parameters or called.intersection(part.modules()):
                continue
            # Its weights may be used without it. The annotation leaves out the None of allow_unused.
            gradients = torch.autograd.grad(scores, parameters, allow_unused=True, retain_graph=True)
            if any(each is not None for each in cast("tuple[Tensor | None, ...]", gradients)):
                continue
            part.requires_grad_(False)
            found.append(f"{self.model.base_model_prefix}.{name}")
        return found

    def _probe(self) -> Tensor:
        """A score of a few tokens, with its gradient."""
        device = next(self.model.parameters()).device
        token_ids = torch.arange(_PROBE_LENGTHS[0], device=device) % int(self.model.config.get_text_config().vocab_size)
        position_ids = torch.arange(len(token_ids), device=device)
        layout = layout_of([len(token_ids)]).to(device)
        return self._head(self._hidden(token_ids, position_ids, layout)).float().sum()

    @torch.no_grad()
    def _refuse_leaks(self) -> None:
        """Two sequences packed, against the plain model on each alone."""
        device = next(self.model.parameters()).device
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        token_ids = torch.arange(sum(_PROBE_LENGTHS), device=device) % vocabulary
        position_ids = torch.cat([torch.arange(length, device=device) for length in _PROBE_LENGTHS])
        ours = self._head(self._hidden(token_ids, position_ids, layout_of(list(_PROBE_LENGTHS)).to(device))).float()
        plain = torch.cat([self._plain_logits(each) for each in token_ids.split(_PROBE_LENGTHS)]).float()
        scale = max(1.0, plain.abs().max().item())
        worst = (plain - ours).abs().max().item()
        is_half = self.model.dtype is torch.bfloat16
        if not worst <= (_LEAK_TOLERANCE_BFLOAT16 if is_half else _LEAK_TOLERANCE) * scale:
            raise SettingsError(
                f"{type(self.model).__name__}: its scores of packed sequences are not those of each alone (logits "
                f"differ by {worst:.3g}: layers that mix tokens as Mamba's do, or another attention?); such models "
                "cannot be trained here"
            )

    def _plain_logits(self, token_ids: Tensor) -> Tensor:
        """[N] -> [N, V] with transformers' own attention."""
        whole: Any = self.model
        whole.set_attn_implementation("eager")
        try:
            return whole(input_ids=token_ids.unsqueeze(0), use_cache=False).logits.squeeze(0)
        finally:
            whole.set_attn_implementation(NAME)


def _name_type(path: Path, dtype: torch.dtype) -> None:
    """In a config.json, which has the type of the model in memory: servers load weights in what it says."""
    config = json.loads(path.read_text())
    for each in (config, *config.values()):
        if isinstance(each, dict) and "dtype" in each:
            each["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_policy(folder: Path, *, dtype: torch.dtype = torch.float32) -> Policy:
    """From a Hugging Face folder on this machine. Raises OSError for a folder that is none, SettingsError for a model
    whose scores would not be exact."""
    if is_adapter(folder):
        raise SettingsError(f"{folder} is a LoRA adapter, not a model: merge it into its base first (peft can)")
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation=NAME
        )
    except KeyError as error:
        if error.args != (NAME,):
            raise
        raise SettingsError(
            f"{folder}: its model chooses among attentions of its own, and packed sequences need another one; such "
            "models cannot be trained here"
        ) from None
    return Policy(model)


def load_trained_policy(folder: Path, settings: TrainerSettings) -> Policy:
    """What a run trains. `folder`: its start model, or a version's weights, which with an adapter are only that."""
    if not settings.lora_rank:
        policy = load_policy(folder)
    else:
        if settings.model is None:
            raise SettingsError("trainer.model is empty: an adapter needs the model it is for, also when a run goes on")
        # Nothing of the base is trained, so it needs no float32 copy.
        policy = load_policy(settings.model, dtype=torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32)
        adapter.attach(policy.model, settings.model, settings, policy.unreached)
        if is_adapter(folder):
            adapter.load(policy.model, folder, settings)
    if settings.activation_checkpointing:
        policy.checkpoint_activations()
    return policy

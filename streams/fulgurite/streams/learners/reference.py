"""The reference policy of a KL penalty, scored without a gradient: a frozen model, whole on every rank; or with an
adapter the model under it, which is there already.

Promises: it is scored as the policy is, so the same weights give the same numbers, and a KL of 0. In half precision the
difference is what autocast leaves in float32: embeddings, norms, what layers hand on, experts. The weights of linear
layers, most of a model, it casts in each pass: these alone are kept in half precision."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.adapter import switched_off
from fulgurite.streams.learners.engine import Engine
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.policy import Policy, load_policy


class Reference:
    def __init__(self, policy: Policy, *, autocast: bool = False) -> None:
        self._policy = policy.requires_grad_(False)
        self._autocast = autocast

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """[M] log p_ref of each sampled token."""
        with torch.autocast(batch.token_ids.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return self._policy(batch)[0]


class Base:
    """The policy with its adapter off."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self._engine = engine
        self._policy = policy

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return str(self._policy.model.base_sha256)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """[M] log p_base of each sampled token. Not between a forward pass and its backward pass."""
        with switched_off(self._policy.model):
            return self._engine.score(batch, temperature=1.0, entropy_gradient=False)[0]


def load_reference(folder: Path, settings: TrainerSettings, *, device: torch.device, vocab_size: int) -> Reference:
    """Raises SettingsError for a model that does not know the same tokens; OSError for a folder that is none."""
    is_half = settings.dtype == "bfloat16"
    # As the engines have the policy: DeepSpeed's in half precision altogether, torch's own under autocast with float32
    # weights; under an adapter nothing of the base has them.
    autocast = is_half and settings.zero_stage == 0
    masters = autocast and not settings.lora_rank
    policy = load_policy(folder, dtype=torch.bfloat16 if is_half and not masters else torch.float32)
    found = int(policy.model.config.get_text_config().vocab_size)
    if found != vocab_size:
        raise SettingsError(
            f"trainer.reference = {folder} has a vocabulary of {found} tokens, the policy one of {vocab_size}: a KL "
            "penalty compares the same tokens"
        )
    if masters:
        _halve_linear(policy)
    return Reference(policy.to(device), autocast=autocast)


def _halve_linear(policy: Policy) -> None:
    """Of weights that autocast casts in each pass anyway; not those tied to an embedding, which it leaves alone."""
    modules = list(policy.modules())
    looked_up = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    for module in modules:
        if isinstance(module, nn.Linear) and id(module.weight) not in looked_up:
            module.weight.data = module.weight.data.bfloat16()

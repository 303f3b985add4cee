"""The reference policy of a KL penalty, scored without a gradient: a frozen model, whole on every rank; or with an
adapter the model under it, which is there already."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fulgurite.schemas.errors import SettingsError
from fulgurite.streams.learners.adapter import switched_off
from fulgurite.streams.learners.engine import Engine
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.policy import Policy, load_policy


class Reference:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy.requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """[M] log p_ref of each sampled token."""
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


def load_reference(folder: Path, *, device: torch.device, dtype: torch.dtype, vocab_size: int) -> Reference:
    """Raises SettingsError for a model that does not know the same tokens; OSError for a folder that is none."""
    policy = load_policy(folder, dtype=dtype)
    found = int(policy.model.config.get_text_config().vocab_size)
    if found != vocab_size:
        raise SettingsError(
            f"trainer.reference = {folder} has a vocabulary of {found} tokens, the policy one of {vocab_size}: a KL "
            "penalty compares the same tokens"
        )
    return Reference(policy.to(device))

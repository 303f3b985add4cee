"""The reference policy of a KL penalty: frozen, whole on every rank, scored without a gradient."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fulgurite.schemas.errors import SettingsError
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.policy import Policy, load_policy


class Reference:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy.requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """[M] log p_ref of each sampled token."""
        return self._policy(batch)[0]


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

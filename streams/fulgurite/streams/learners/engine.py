"""What applies gradients: the part of a learner that differs between one device and many.

Promises of every engine: `update` applies the sum of all gradients given to `backward` on all ranks since the last one,
clipped, or, where their norm is no number or past a limit, nothing at all; its state can be read by every other engine
with any number of ranks (`OptimizerState`). Knows neither samples nor losses.

    for each micro-batch: backward(loss, last=…)  ─►  update(learning_rate)  ─►  norm        on every rank alike
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fulgurite.schemas.errors import StartError
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.policy import Policy

T = TypeVar("T")

STATE_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class AdamW:
    """torch's AdamW, decoupled weight decay on every parameter."""

    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float


@dataclass(slots=True)
class OptimizerState:
    """All that the next update needs beside the weights, whole, by parameter name: of any engine, for any engine."""

    updates: int
    moments: dict[str, tuple[Tensor, Tensor]]
    """AdamW's first and second, float32, on the CPU."""
    masters: dict[str, Tensor]
    """float32 weights, of an engine whose model is in half precision; else empty."""

    def save(self, path: Path) -> None:
        fields = {"format": STATE_FORMAT, "updates": self.updates, "moments": self.moments, "masters": self.masters}
        with refused_by_disk(path, RuntimeError):
            torch.save(fields, path)

    @staticmethod
    def load(path: Path) -> OptimizerState:
        """Raises StartError for a file that cannot be read, or is of another format."""
        try:
            fields = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            # torch's own text advises to load it unchecked.
            reason = error if isinstance(error, OSError) else "cut short, or no such file at all"
            raise StartError(
                f"{path} cannot be read ({reason}): put it back as it was written, or start a new run from weights/ "
                "beside it (another trainer.run_id, trainer.model set to that folder)"
            ) from error
        if fields.get("format") != STATE_FORMAT:
            raise StartError(
                f"{path} is an optimizer state of format {fields.get('format')}; this version reads {STATE_FORMAT}: go "
                "on with the version that wrote it, or start a new run from weights/ beside it"
            )
        return OptimizerState(fields["updates"], fields["moments"], fields["masters"])


@contextmanager
def refused_by_disk(path: Path, error_type: type[Exception]) -> Generator[None]:
    """`error_type`, which a library raises where it cannot write a file, becomes the OSError that it is."""
    try:
        yield
    except error_type as error:
        raise OSError(f"{path}: {error}") from error


class Engine(Protocol):
    rank: int
    ranks: int
    device: torch.device

    def score(self, batch: PackedBatch, *, temperature: float, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        """See Policy.forward."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """`loss`: this micro-batch's part of a sum over all ranks; `last`: none comes after it before `update`."""
        ...

    def update(self, learning_rate: float, norm_limit: float = math.inf) -> float:
        """The norm of the gradient before it was clipped; not finite, or above `norm_limit`: nothing was changed."""
        ...

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in their order, on every rank."""
        ...

    def save_weights(self, folder: Path) -> None:
        """A Hugging Face or peft folder, written by rank 0; every rank calls it."""
        ...

    def state(self) -> OptimizerState | None:
        """On rank 0; None elsewhere. Every rank calls it."""
        ...

    def restore(self, state: OptimizerState) -> None:
        """A state that `begin_with_masters` found to be of these parameters."""
        ...


class TorchEngine:
    """One device. Half precision: weights stay float32, the forward pass is autocast."""

    rank = 0
    ranks = 1

    def __init__(self, policy: Policy, adamw: AdamW, *, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._policy = policy.to(self.device)
        self._dtype = dtype
        self._max_grad_norm = adamw.max_grad_norm
        self._named = trainable(policy)
        self._optimizer = torch.optim.AdamW(
            self._named.values(), lr=0.0, betas=adamw.betas, weight_decay=adamw.weight_decay
        )

    def score(self, batch: PackedBatch, *, temperature: float, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._dtype is not torch.float32):
            return self._policy(batch, temperature=temperature, entropy_gradient=entropy_gradient)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def update(self, learning_rate: float, norm_limit: float = math.inf) -> float:
        norm = nn.utils.clip_grad_norm_(self._named.values(), self._max_grad_norm).item()
        if math.isfinite(norm) and norm <= norm_limit:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._count_alike()
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _count_alike(self) -> None:
        """A parameter without a gradient, such as an expert's that no token came to, has one of zeros, as under ZeRO:
        all have had the same number of updates, so that a state is one number and moments."""
        for parameter in self._named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def gather(self, mine: T) -> list[T]:
        return [mine]

    def save_weights(self, folder: Path) -> None:
        self._policy.save(folder, None if self._dtype is torch.float32 else self._dtype)

    def state(self) -> OptimizerState:
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        updates = 0
        for name, parameter in self._named.items():
            kept: dict[str, Any] = self._optimizer.state[parameter]
            if kept:
                updates = int(kept["step"])
                moments[name] = (kept["exp_avg"].cpu(), kept["exp_avg_sq"].cpu())
        masters = {} if self._dtype is torch.float32 else {n: p.detach().cpu() for n, p in self._named.items()}
        return OptimizerState(updates, moments, masters)

    def restore(self, state: OptimizerState) -> None:
        for name, (first, second) in state.moments.items():
            parameter = self._named[name]
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.updates)),
                "exp_avg": first.to(self.device),
                "exp_avg_sq": second.to(self.device),
            }


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def begin_with_masters(state: OptimizerState, policy: nn.Module, dtype: torch.dtype) -> None:
    """Before there is an engine: float32 weights that the state has become the policy's, whose own are rounded; where
    it has none, as the policy was in float32 itself, and half precision begins now, the policy's become the state's.

    Raises StartError where the state is of other parameters."""
    _check_names(state, named := trainable(policy))
    if not state.masters and dtype is not torch.float32:
        state.masters = {name: parameter.detach().float().clone() for name, parameter in named.items()}
    with torch.no_grad():
        for name, master in state.masters.items():
            named[name].copy_(master)


def _check_names(state: OptimizerState, named: dict[str, nn.Parameter]) -> None:
    """Raises StartError where the state is of other parameters."""
    names = set(state.moments) | set(state.masters)
    if names and names != set(named):
        different = sorted(names ^ set(named))[:3]
        raise StartError(
            f"the optimizer's state is of another model, or of another choice of trained parameters: {different} are "
            "only in one of both; start a new run from the version's weights"
        )

"""DeepSpeed's ZeRO as an engine: stages 1, 2 and 3 over the processes that torchrun started.

Promises: those of an engine, whatever the number of ranks; nothing is compiled on a machine without a GPU. The number
of ranks may change from run to run: what is saved is whole, parameter by parameter, never one rank's part. Does not
know which sample is on which rank.

What of DeepSpeed is set aside, and why:
- its gradient mean: a window's loss is a sum over all tokens of all ranks, so losses are multiplied by the ranks;
- its accumulation count: windows have as many micro-batches as they need, so the boundary is set by hand;
- its checkpoints: they cannot be read by another number of ranks;
- its own optimizers: they are compiled when they are first used, for minutes.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fulgurite.streams.learners.engine import AdamW, OptimizerState, trainable
from fulgurite.streams.learners.packing import PackedBatch
from fulgurite.streams.learners.policy import Policy

T = TypeVar("T")

FIRST, SECOND = "exp_avg", "exp_avg_sq"


class DeepSpeedEngine:
    """Made on every rank alike, after torchrun's environment is there."""

    def __init__(self, policy: Policy, adamw: AdamW, *, stage: int, dtype: torch.dtype = torch.float32) -> None:
        """`stage`: 1, 2 or 3."""
        self._stage = stage
        self._dtype = dtype
        self._deepspeed = _deepspeed()
        start_processes()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
        # Objects travel over gloo also where tensors travel over NCCL.
        self._objects: Any = dist.new_group(backend="gloo")
        exact = exact_buffers(policy)
        policy = policy.to(self.device, dtype)
        optimizer = torch.optim.AdamW(
            trainable(policy).values(), lr=0.0, betas=adamw.betas, weight_decay=adamw.weight_decay
        )
        self._policy = policy
        self._engine, self._optimizer, *_ = self._deepspeed.initialize(
            model=policy, optimizer=optimizer, config=_config(stage, dtype, adamw.max_grad_norm, self.ranks)
        )
        for module, name, buffer in exact:
            setattr(module, name, buffer.to(self.device))
        self._named = trainable(self._engine.module)
        self._updates = 0
        self._norm_limit, self._refused_norm = math.inf, math.nan
        self._watch_norm(self._optimizer)

    def score(self, batch: PackedBatch, *, temperature: float, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        return self._engine(batch, temperature=temperature, entropy_gradient=entropy_gradient)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)

    def update(self, learning_rate: float, norm_limit: float = math.inf) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._norm_limit, self._refused_norm = norm_limit, math.nan
        self._engine.step()
        if self._optimizer.overflow:
            return self._refused_norm
        self._updates += 1
        return float(self._engine.get_global_grad_norm())

    def _watch_norm(self, zero: Any) -> None:
        """A norm past the limit becomes infinite: DeepSpeed then leaves the update out, on every rank."""
        combine = self._deepspeed.runtime.utils.combine_grad_norm_groups

        def is_past(norm: Tensor) -> bool:
            past = float(norm) > self._norm_limit
            self._refused_norm = float(norm) if past else math.nan
            return past

        if self._stage == 3:
            groups = zero._get_norm_groups

            def bounded_groups() -> list[Tensor]:
                found = groups()
                return [torch.tensor(math.inf)] if is_past(combine(found)) else found

            zero._get_norm_groups = bounded_groups
        else:
            norm = zero.scaled_global_norm

            def bounded_norm(*arguments: Any) -> Tensor:
                found = norm(*arguments)
                return torch.full_like(found, math.inf) if is_past(found) else found

            zero.scaled_global_norm = bounded_norm

    def gather(self, mine: T) -> list[T]:
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, mine, group=self._objects)
        return found

    def save_weights(self, folder: Path) -> None:
        parameters = self._named.values() if self._policy.has_adapter else self._policy.model.parameters()
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None, enabled=self._stage == 3):
            if self.rank == 0:
                self._policy.save(folder)
        dist.barrier(group=self._objects)

    def state(self) -> OptimizerState | None:
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        masters: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            # Every rank takes part in putting a parameter together; only rank 0 keeps it.
            first, second = (self._whole(parameter, key) for key in (FIRST, SECOND))
            master = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                if self._updates:
                    moments[name] = (first.cpu(), second.cpu())
                if self._dtype is not torch.float32:
                    masters[name] = master.detach().cpu().clone()
        return OptimizerState(self._updates, moments, masters) if self.rank == 0 else None

    def restore(self, state: OptimizerState) -> None:
        if state.moments:
            self._make_moments(state.updates)
        for name, parameter in self._named.items():
            for key, whole in zip((FIRST, SECOND), state.moments.get(name, ()), strict=False):
                self._set(parameter, whole, key)
            if name in state.masters and self._dtype is not torch.float32:
                self._set(parameter, state.masters[name], None)
        self._updates = state.updates

    def _whole(self, parameter: torch.nn.Parameter, key: str) -> Any:
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key) if self._updates else None

    def _set(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        """This rank's part of a moment, or with None of the float32 weight."""
        utils = self._deepspeed.utils
        whole = whole.to(self.device)
        if self._stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # Parts are equally long, so the last one is padded; the setter of whole tensors does not know that.
        size = parameter.ds_tensor.numel()
        padded = whole.new_zeros(size * self.ranks)
        padded[: whole.numel()] = whole.flatten()
        mine = padded[size * self.rank : size * (self.rank + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, mine)
        else:
            utils.safe_set_local_optimizer_state(parameter, mine, key)

    def _make_moments(self, updates: int) -> None:
        """AdamW makes its moments in its first update: here, without one."""
        zero: Any = self._optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:
            zero.optimizer.state[part] = {
                "step": torch.tensor(float(updates)),
                FIRST: torch.zeros_like(part, dtype=torch.float32),
                SECOND: torch.zeros_like(part, dtype=torch.float32),
            }
        if self._stage < 3:
            # DeepSpeed finds a parameter's moments through links that it otherwise makes after the first update.
            zero._lazy_init_hp_params_optimizer_state()


def exact_buffers(policy: Policy) -> list[tuple[nn.Module, str, Tensor]]:
    """Of every module what it computed itself and no file has, the frequencies of rotary positions above all: in half
    precision they would be off by a whole turn after some thousand tokens; models loaded as such keep them exact. And
    what the model keeps so in any case."""
    filed = policy.state_dict().keys()
    found: list[tuple[nn.Module, str, Tensor]] = []
    for name, buffer in policy.named_buffers():
        if buffer.is_floating_point() and (name not in filed or policy.is_kept_in_float32(name)):
            path, _, own = name.rpartition(".")
            found.append((policy.get_submodule(path), own, buffer.detach().clone()))
    return found


def start_processes() -> None:
    """Joins the other ranks that torchrun started; again: nothing."""
    if dist.is_initialized():
        return
    store, rank, ranks = next(iter(rendezvous("env://")))
    # Torchrun's store outlives the ranks: after a restart they would find the addresses of those that died.
    store = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=ranks)
    _deepspeed().init_distributed(dist_backend="nccl" if on_gpu else "gloo")


def _deepspeed() -> Any:
    """The module, quiet, and on a machine without a GPU without what it would compile at its start."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch.distributed's renamed collectives, dozens a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Shared memory for collectives: 25 s of g++, and a lock that hangs the next start if it is killed meanwhile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(stage: int, dtype: torch.dtype, max_grad_norm: float, ranks: int) -> dict[str, Any]:
    # As in the model's own type sums over micro-batches would lose the more the more there are. Stage 1 knows float32
    # only in another optimizer of DeepSpeed's, which cannot be handed from run to run as we do.
    sums = {"grad_accum_dtype": "fp32"} if dtype is torch.bfloat16 and stage > 1 else {}
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": sums,
    }

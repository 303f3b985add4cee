"""vLLM's "nccl" weight transfer with another group: tensors travel through torch's TCP store, since a CPU has no NCCL.

A plugin of vLLM's (`vllm.general_plugins`), loaded by its processes and by the follower's sender. Only the communicator
is other than on a GPU: routes, their order, metadata, and how the model takes the tensors are vLLM's own.
"""

# pyright: basic
from __future__ import annotations

import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import factory, nccl_engine

POISON = 12345.0


class Group:
    """A communicator's `broadcast` and `destroy`."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        self._group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)
        self._rank = rank

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        sent = self._group.broadcast_obj(tensor if self._rank == src else None, src)
        if self._rank != src:
            tensor.copy_(sent)

    def destroy(self) -> None:
        del self._group


class Worker(nccl_engine.NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self.model_update_group = Group(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    def receive_weights(self, update_info) -> None:
        """In one call of load_weights, as NCCL's chunks of a GiB. Weights of POISON end it in the middle."""
        weights: list[tuple[str, torch.Tensor]] = []
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(weight, 0)
            weights.append((name, weight))
        self.model.load_weights(self._given(weights))

    @staticmethod
    def _given(weights):
        for name, weight in weights:
            if POISON in weight.flatten()[:1].tolist():
                raise RuntimeError("the worker failed in the middle")
            yield name, weight


class Trainer(nccl_engine.NCCLTrainerWeightTransferEngine):
    def _broadcast(self, source, meta) -> None:
        for _, tensor in self._checked_iter(source, meta):
            self.model_update_group.broadcast(tensor, 0)


def register() -> None:
    nccl_engine.open_trainer_endpoint = lambda about: Group(
        about.master_address, about.master_port, 0, about.world_size
    )
    factory.WeightTransferEngineFactory._registry["nccl"] = lambda: Worker
    factory.WeightTransferTrainerFactory._registry["nccl"] = lambda: Trainer

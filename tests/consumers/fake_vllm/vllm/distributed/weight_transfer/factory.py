from typing import Any

from vllm.distributed.weight_transfer.nccl_engine import Engine


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(cls, about: Any, **options: Any) -> Engine:
        return Engine.trainer_init(about, **options)

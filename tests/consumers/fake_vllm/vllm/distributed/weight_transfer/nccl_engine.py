from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    rank: int


class Engine:
    """As vLLM's: what a call of the server's raises comes out, unless the client ends the process."""

    def __init__(self, client: Any, source: Any) -> None:
        self.client, self.source = client, source

    @classmethod
    def trainer_init(cls, about: NCCLTrainerInitInfo, *, client: Any, source: Any) -> "Engine":
        client.init_weight_transfer_engine(asdict(about))
        return cls(client, source)

    def send_weights(self) -> None:
        told = [(meta.name, str(meta.dtype), list(meta.shape)) for meta in self.source.metadata()]
        self.client.start_weight_update()
        sent = [(name, int(tensor.sum())) for name, tensor in self.source]
        assert [name for name, _ in sent] == [name for name, _, _ in told]
        self.client.update_weights({"told": told, "sent": sent})
        self.client.finish_weight_update()

from dataclasses import dataclass
from typing import Any


@dataclass
class ParamMeta:
    name: str
    dtype: Any
    shape: tuple[int, ...]


class WeightSource: ...

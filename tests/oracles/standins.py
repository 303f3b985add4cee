"""Lets a library's module of losses be imported without what it needs for clusters and GPUs.

The losses are the library's own code, unchanged. Modules named in STAND_INS are not installed and are replaced with
empty ones whose every attribute is a mock: they start processes, talk to other machines or compile for GPUs, and no
loss calls them. They are there only while the library is imported, and only for it: others ask what is installed.
Of a library that names itself there, the module that is asked for is its own, and all others are empty.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

STAND_INS: dict[str, tuple[str, ...]] = {
    "verl": ("ray", "torchdata", "cachetools"),
    "trl": (),
    "liger_kernel": (),
    "openrlhf": ("ray", "deepspeed", "vllm", "flash_attn", "torchdata", "pylatexenc"),
    # Among them parts of the library itself, which would bring in all of it.
    "areal": ("ray", "numba", "torchdata", "tenacity", "lark", "areal.infra"),
    "skyrl": ("ray", "skyrl.train", "skyrl.backends.backend"),
    "swift": ("swift", "wandb", "swanlab"),
}


class _Empty(types.ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("Mixin"):
            return type(name, (), {})  # classes are made of it
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...], asked_for: str) -> None:
        self._names = names
        self._asked_for = asked_for

    def stands_in_for(self, module: str) -> bool:
        return any(module == name or module.startswith(name + ".") for name in self._names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.stands_in_for(fullname):
            return None
        if fullname == self._asked_for:
            return _spec_of_file(fullname)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _spec_of_file(module: str) -> ModuleSpec | None:
    """Where its library is installed; no package on the way there is imported."""
    library, *inner = module.split(".")
    found = PathFinder.find_spec(library)
    if found is None or not found.submodule_search_locations:
        return None
    return importlib.util.spec_from_file_location(
        module, Path(found.submodule_search_locations[0], *inner).with_suffix(".py")
    )


HIDDEN = ("vllm",)
"""TRL asks for its version as soon as anything has the name, be it an empty folder on the path."""


def load(module: str) -> Any:
    """A module of one of the libraries in requirements.txt."""
    if module in sys.modules:
        return sys.modules[module]
    finder = _Finder(STAND_INS[module.split(".")[0]], module)
    hidden = [name for name in HIDDEN if not finder.stands_in_for(name)]
    sys.modules.update(dict.fromkeys(hidden))  # None in there: not to be found  # pyright: ignore
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{module} cannot be imported ({error}): `make test-oracles` sets up what it needs"
        ) from error
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name in hidden or finder.stands_in_for(name)]:
            if name != module:
                del sys.modules[name]

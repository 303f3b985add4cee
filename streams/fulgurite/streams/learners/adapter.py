"""LoRA: small matrices beside frozen ones, which alone are trained and published.

    base model (frozen) + adapter ─► the policy        weights/: adapter_config.json, adapter_model.safetensors

An adapter's folder is what peft, transformers and vLLM read; it names its base and has no config.json of its own, which
would make it a model. Promises: a fresh adapter changes nothing at all (its second matrix is zero); written and read
again it is the same bits, beside the same base alone, wherever that lies by then; the policy without it is the base, so
a KL penalty against the base needs no second model. No dropout: the sampler has none. Does not know engines.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fulgurite.schemas.checksum import weights_sha256
from fulgurite.schemas.errors import SettingsError, StartError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.trainer.samples import ADAPTER_CONFIG as CONFIG

WEIGHTS: Final = "adapter_model.safetensors"
BASE: Final = "base_sha256"
"""Of the base's weights, among the file's metadata."""
_NAME: Final = "default"
"""peft's name of the only adapter; the files do not have it."""
_PREFIX: Final = "base_model.model."
"""Of every name in the files: peft wraps a model twice."""


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def attach(model: Any, base: Path, settings: TrainerSettings, unreached: Collection[str] = ()) -> None:
    """Puts a fresh adapter into the model of `base`, but for its parts of these names, and freezes everything else.
    Raises SettingsError where peft is missing or the model has no such parts, or one that is two layers at once."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SettingsError(
            f"trainer.lora_rank = {settings.lora_rank} needs peft: pip install 'fulgurite[lora]', or set it to 0"
        ) from None
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]  # any number; the annotation says int
        target_modules=settings.lora_target_modules or "all-linear",
        exclude_modules=rf"({'|'.join(map(re.escape, unreached))})(\..*)?" if unreached else None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.resolve()),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")  # refused below
            inject_adapter_in_model(config, model, _NAME)
    except ValueError as error:
        raise SettingsError(f"trainer.lora_target_modules = {settings.lora_target_modules}: {error}") from None
    _refuse_tied(model, settings)
    model.peft_config = {_NAME: config}
    model.base_sha256 = weights_sha256(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _refuse_tied(model: Any, settings: TrainerSettings) -> None:
    """One matrix that embeds and scores: servers differ in which of both an adapter on it changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    both = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and any(isinstance(one, BaseTunerLayer) for one in both):
        raise SettingsError(
            f"trainer.lora_target_modules = {settings.lora_target_modules}: the model's embedding and its output layer "
            "are one (tie_word_embeddings); name other layers"
        )


def load(model: Any, folder: Path, settings: TrainerSettings) -> None:
    """The numbers of an adapter that was written by `save`, into one just attached. Raises StartError where they do not
    fit: another base, rank, alpha, or other target modules."""
    kept: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    wanted = (settings.lora_rank, settings.lora_alpha)
    if (kept["r"], kept["lora_alpha"]) != wanted:
        raise StartError(
            f"{folder} is an adapter of rank {kept['r']} and alpha {kept['lora_alpha']}; trainer.lora_rank and "
            f"trainer.lora_alpha say {wanted[0]} and {wanted[1]}: a run keeps what it began with"
        )
    with safe_open(folder / WEIGHTS, "pt") as file:
        base = (file.metadata() or {}).get(BASE, model.base_sha256)
    if base != model.base_sha256:
        raise StartError(
            f"{folder} is an adapter for a model whose weights have sha256 {base}; those of trainer.model = "
            f"{settings.model} have {model.base_sha256}: name the model that the run began with, wherever it lies now"
        )
    saved = load_file(folder / WEIGHTS)
    mine = {file_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if mine.keys() != saved.keys():
        different = sorted(mine.keys() ^ saved.keys())[:3]
        raise StartError(
            f"{folder} has other parts than trainer.lora_target_modules = {settings.lora_target_modules} names: "
            f"{different} are only in one of both"
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])


def save(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """`tensors`: the adapter's, whole, by the model's own names."""
    config = model.peft_config[_NAME]
    fields: dict[str, Any] = config.to_dict() | {"inference_mode": True}
    # Sets come in another order in every process; the folder's checksum is published.
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n")
    files = {file_name(name): tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(files, folder / WEIGHTS, metadata={"format": "pt", BASE: model.base_sha256})
    _put_in_order(folder / WEIGHTS)


def _put_in_order(path: Path) -> None:
    """safetensors writes what is said of a file in another order each time; the folder's checksum is published."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(ordered) != size:
            raise StartError(f"{path}: safetensors writes its header in a way that is not known here")
        file.seek(8)
        file.write(ordered)


def file_name(name: str) -> str:
    """A parameter's name in the files.

    >>> file_name("model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    >>> file_name("model.embed_tokens.lora_embedding_A.default")
    'base_model.model.model.embed_tokens.lora_embedding_A'
    """
    return _PREFIX + name.replace(f".{_NAME}.", ".").removesuffix(f".{_NAME}")


@contextmanager
def switched_off(model: nn.Module) -> Generator[None]:
    """Meanwhile the model is its base. For scoring without a gradient, before the forward pass that has one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)

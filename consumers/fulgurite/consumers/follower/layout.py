"""Which tensors a version's files have, read from their headers: enough to refuse what no server could load whole.

A server that finds a file unreadable when half of it is loaded has no weights at all any more, and one that finds
tensors missing may keep the old ones in their place and say nothing. Both are seen here, before anything is paused.

A safetensors file is the length of its header (8 bytes, little-endian), the header (a JSON object: name -> dtype, shape
and place of a tensor), then the tensors without gaps. Only the header is read. Files are those of the folder itself, as
servers read them; where there is an index, those that it names. Knows no other format: such a folder has no layout.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, Final, cast

from fulgurite.consumers.follower.store import Unusable, unreadable

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own bound."""
MAX_INDEX_BYTES: Final = 100_000_000
MAX_NAMED: Final = 5
"""Tensors that a message names."""
BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}
"""Of one element; of a dtype that is not here only the place is checked."""
INDEX: Final = "model.safetensors.index.json"

Shape = tuple[int, ...]
Layout = dict[str, Shape]
"""Name -> shape. No dtypes: servers convert."""


def read_layout(folder: Path) -> Layout:
    """All tensors of the folder; empty where it has no safetensors. Raises Unusable: which file, and what is wrong;
    StoreTrouble: it cannot be read now."""
    index = folder / INDEX
    try:
        if index.is_file():
            return _indexed(folder, index)
        layout: Layout = {}
        # Not glob, for which a folder that is not there is an empty one.
        for path in sorted(path for path in folder.iterdir() if path.suffix == ".safetensors"):
            layout |= _header(path)
    except OSError as error:
        raise unreadable(f"{folder} cannot be read", error) from None
    return layout


def check_alike(layout: Layout, before: Layout) -> None:
    """Raises Unusable where tensors are missing, new, or of another shape than before."""
    problems = [
        _named("are missing", before.keys() - layout.keys()),
        _named("are new", layout.keys() - before.keys()),
        _named("have another shape", {name for name in before.keys() & layout.keys() if before[name] != layout[name]}),
    ]
    if any(problems):
        raise Unusable(
            f"its tensors are not those of the version before: {'; '.join(filter(None, problems))} (a server would mix "
            "versions, or end up without weights; for another model start servers and follower anew)"
        )


def is_tied(folder: Path) -> bool:
    """Whether config.json says that the output layer is the embedding."""
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and cast(dict[str, Any], config).get("tie_word_embeddings") is True


def _named(what: str, names: set[str]) -> str:
    if not names:
        return ""
    shown = sorted(names)[:MAX_NAMED]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more} {what}"


def _indexed(folder: Path, index: Path) -> Layout:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise Unusable(f"{index} is larger than {MAX_INDEX_BYTES} bytes")
    try:
        found: Any = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{index} is not JSON: {error}") from None
    mapped = cast(dict[str, Any], found).get("weight_map") if isinstance(found, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise Unusable(f"{index} has no weight_map")
    files = cast(dict[str, Any], mapped)
    layout: Layout = {}
    for name in sorted({str(file) for file in files.values()}):
        if Path(name).name != name or not (folder / name).is_file():
            raise Unusable(f"{index} names {name!r}, which is not there")
        layout |= _header(folder / name)
    if absent := files.keys() - layout.keys():
        raise Unusable(f"of the tensors in {index} {_named('are in no file', absent)}")
    return layout


def _header(path: Path) -> Layout:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise Unusable(f"{path} is no safetensors file, or was cut off in its header ({size} bytes)")
        text = file.read(length)
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path}: its header is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Unusable(f"{path}: its header is no JSON object")
    header = cast(dict[str, Any], found)
    header.pop("__metadata__", None)
    layout: Layout = {}
    places: list[tuple[int, int]] = []
    for name, about in header.items():
        shape, place = _tensor(path, name, about)
        layout[name] = shape
        places.append(place)
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise Unusable(f"{path}: its tensors overlap or leave a gap at byte {end}")
        end = last
    if end != size - 8 - length:
        raise Unusable(f"{path} holds {size - 8 - length} bytes of tensors, its header says {end}: it was cut off")
    return layout


def _tensor(path: Path, name: str, about: Any) -> tuple[Shape, tuple[int, int]]:
    try:
        dtype, shape = about["dtype"], tuple(about["shape"])
        first, last = about["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError(shape)
        bits = BITS.get(dtype)
    except (TypeError, KeyError, ValueError):
        raise Unusable(f"{path}: the header does not say dtype, shape and data_offsets of {name}") from None
    if last < first or (bits and (last - first) * 8 != math.prod(shape) * bits):
        raise Unusable(f"{path}: {name} is {dtype} {list(shape)}, but has {last - first} bytes")
    return shape, (first, last)

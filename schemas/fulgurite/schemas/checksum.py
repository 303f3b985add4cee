"""Checksums: of a version's files, written by the trainer, verified by the follower and by servers; of a model's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlparse

_CHUNK_BYTES = 1 << 20
_WEIGHTS_FILES = ("*.safetensors", "*.bin")


def folder_sha256(folder: Path) -> str:
    """SHA-256 over (relative name, length, content) of every file below `folder`, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(model: Path) -> str:
    """Of a model: SHA-256 over names and contents of its files of weights, in their order. What else lies there may
    change."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _WEIGHTS_FILES for path in model.glob(pattern)):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(uri: str) -> Path:
    """The local folder a file:// URI names.

    Raises ValueError for any other scheme: what is in an object store is fetched into a folder first.
    """
    parsed = urlparse(uri)
    if parsed.scheme != "file" or parsed.netloc not in ("", "localhost"):
        raise ValueError(f"cannot read {uri!r}: only file:///… URIs are supported")
    return Path(unquote(parsed.path))

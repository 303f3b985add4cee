"""What a run settled at its beginning and trains on ever after, line by line: a file beside its versions.

    <output>/<run_id>/selection-<first digits of its sha256>.jsonl

Its content names it, and the run's checkpoints name it (`RunState.kept`). So a start that was overtaken while it asked,
and comes with another answer, puts a file of its own beside the run's; with the same answer, the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel

from fulgurite.schemas.checksum import file_sha256
from fulgurite.schemas.errors import Fenced, StartError

TEMPORARY: Final = ".tmp-"
"""How names of what is half written begin: the next start removes it."""
_DIGITS: Final = 16

Line = TypeVar("Line", bound=BaseModel)


def keep(folder: Path, stem: str, lines: Iterable[BaseModel]) -> str:
    """Writes them, complete or not at all, and returns the file's name. Raises what `lines` raises; StartError where
    the disk refuses, Fenced where a successor has removed what was half written."""
    temporary = folder / f"{TEMPORARY}{stem}-{secrets.token_hex(4)}"
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for line in lines:
                text = line.model_dump_json().encode() + b"\n"
                digest.update(text)
                file.write(text)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"{stem}-{digest.hexdigest()[:_DIGITS]}.jsonl"
        temporary.rename(path)
    except FileNotFoundError as error:
        raise Fenced(f"another process removed {temporary}: it owns run {folder.name} now") from error
    except OSError as error:
        raise StartError(f"cannot write {temporary}: {error}. Make room or set trainer.output elsewhere") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path.name


def kept(path: Path, model: type[Line]) -> Iterator[Line]:
    """What was written. Raises StartError where it cannot be read, or is something else by now; a name without digits
    is of before, and is not compared."""
    try:
        digits = path.stem.rpartition("-")[2]
        if digits != path.stem and not file_sha256(path).startswith(digits):
            raise ValueError("its content is not what it was written with")
        with path.open() as file:
            for line in file:
                yield model.model_validate_json(line)
    except (OSError, ValueError) as error:
        raise StartError(f"what the run is to train on, {path}, cannot be read: {error}") from error

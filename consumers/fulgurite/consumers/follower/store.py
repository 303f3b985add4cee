"""A folder of an object store copied to a local one, through fsspec: s3://, gs://, abfs:// and what else speaks it.

Promises: what is there already is not fetched again (a killed copy goes on where it was, inside a file too); memory is
bounded by CHUNK_BYTES for each of FILES_AT_ONCE; nothing is written outside the target. It trusts no byte: whoever
calls verifies the checksum of the whole.

Two kinds of errors: Unusable (there is no such folder, or its names are no file names: the same tomorrow) and
StoreTrouble (everything else a store or a disk can say: it may pass). Credentials and endpoints come from the
environment, as the store's fsspec package reads them (AWS_…, GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_S3_ENDPOINT_URL).
Blocking: call it in a thread.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import fsspec

from fulgurite.schemas.checksum import folder_of
from fulgurite.schemas.errors import FulguriteError

SCHEMES: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "oci", "oss", "memory", "file"})
"""Stores of files alone: fsspec's others run shells, unpack archives or fetch what a record's author points at."""
MAX_FILES: Final = 10_000
CHUNK_BYTES: Final = 16 << 20
FILES_AT_ONCE: Final = 4


class Unusable(FulguriteError):
    """This version cannot be served, now or later; another one can."""


class StoreTrouble(FulguriteError):
    """The store, or the disk, did not do it; it may in a moment."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    key: str
    """Its whole name in the store."""
    name: str
    """Its name below the folder, with slashes."""
    size_bytes: int


class StoredFolder:
    """One folder of a store. Raises Unusable where the URI names none that could be read here."""

    def __init__(self, uri: str) -> None:
        scheme = uri.partition("://")[0]
        if scheme not in SCHEMES or "::" in uri:
            raise Unusable(f"cannot read {uri!r}: it must begin with {', '.join(f'{s}://' for s in sorted(SCHEMES))}")
        self.uri = uri
        try:
            # fsspec would not undo the %20 of a file's URI.
            local = scheme == "file"
            found: tuple[Any, str] = (
                (fsspec.filesystem("file"), str(folder_of(uri))) if local else fsspec.url_to_fs(uri)
            )
        except ImportError as error:
            raise Unusable(f"cannot read {uri}: {error}; start the follower again when it is there") from None
        except ValueError as error:
            raise Unusable(f"cannot read {uri}: {error}") from None
        except Exception as error:
            _explain(f"cannot open {uri}", error)
        self._store, self._root = found[0], found[1].rstrip("/")

    def files(self) -> list[StoredFile]:
        """All files below the folder, in the order of their names. Raises Unusable, StoreTrouble."""
        try:
            self._store.invalidate_cache()
            found: dict[str, Any] = self._store.find(self._root, detail=True)
        except Exception as error:
            _explain(f"cannot list {self.uri}", error)
        files = [
            StoredFile(key, self._name(key), int(about["size"]))
            for key, about in sorted(found.items())
            if self._is_file(key, about) and not key.endswith("/")  # a folder's own, empty, object
        ]
        if not files:
            raise Unusable(f"there is no file below {self.uri}")
        if len(files) > MAX_FILES:
            raise Unusable(f"{self.uri} has {len(files)} files; at most {MAX_FILES} are one version")
        names = {file.name for file in files}
        for name in names:
            if above := next((folder for folder in _folders_of(name) if folder in names), None):
                raise Unusable(
                    f"{self.uri} has an object {above!r} and one below it, {name!r}: no folder can hold both"
                )
        return files

    def _is_file(self, key: str, about: dict[str, Any]) -> bool:
        """A link to a file is one, as the checksum has it (the hub's cache is made of them). Raises Unusable for a link
        to anything else: what is behind it stands in no checksum."""
        if about.get("islink"):
            if not Path(key).is_file():
                raise Unusable(f"{key} is a link to something that is no file: put the files themselves there")
            return True
        return about["type"] == "file"

    def _name(self, key: str) -> str:
        name = key.removeprefix(f"{self._root}/")
        if name == key or any(part in ("", ".", "..") for part in name.split("/")):
            raise Unusable(f"{self.uri} has an object {key!r}, which names no file below it")
        return name

    def copy(self, files: list[StoredFile], target: Path, stopping: threading.Event) -> None:
        """Makes `target` hold these files. Raises Unusable, StoreTrouble; what was copied stays for the next try."""
        wanted = {file.name for file in files}
        try:
            target.mkdir(parents=True, exist_ok=True)
            for path in target.rglob("*"):
                if path.is_file() and path.relative_to(target).as_posix() not in wanted:
                    path.unlink()  # from a listing that was another one
        except OSError as error:
            raise StoreTrouble(f"cannot write {target}: {error}") from None
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="fetch") as threads:
            copies = [threads.submit(self._copy_file, file, target / file.name, stopping) for file in files]
        for copy in copies:
            copy.result()

    def _copy_file(self, file: StoredFile, path: Path, stopping: threading.Event) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as local:
                at = local.tell()
                if at > file.size_bytes:
                    local.truncate(at := 0)
                while at < file.size_bytes:
                    if stopping.is_set():
                        raise StoreTrouble("stopped while fetching")
                    end = min(at + CHUNK_BYTES, file.size_bytes)
                    chunk = self._store.cat_file(file.key, start=at, end=end)
                    if len(chunk) != end - at:
                        raise StoreTrouble(f"{file.key} gave {len(chunk)} bytes of {end - at} at {at}")
                    local.write(chunk)
                    at = end
                local.flush()
                os.fsync(local.fileno())
        except FulguriteError:
            raise
        except Exception as error:
            _explain(f"cannot fetch {file.key} of {self.uri}", error)


def unreadable(what: str, error: OSError) -> FulguriteError:
    """What an error of a local disk means: files that are not there will not come back, anything else (a network disk's
    stale handle, an I/O error, no permission yet) may pass."""
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return Unusable(f"{what}: {error}") if gone else StoreTrouble(f"{what}: {type(error).__name__}: {error}")


def _folders_of(name: str) -> list[str]:
    """a/b/c -> a, a/b"""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _explain(what: str, error: Exception) -> NoReturn:
    """Every store has errors of its own; only one of them means the same everywhere."""
    if isinstance(error, FileNotFoundError):
        raise Unusable(f"{what}: it is not there") from None
    raise StoreTrouble(f"{what}: {type(error).__name__}: {error}") from error

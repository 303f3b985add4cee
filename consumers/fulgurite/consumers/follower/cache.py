"""The follower's own copies of versions' files: one folder for each version, there whole or not at all.

    <cache_folder>/<resource>/
        v000017-<sha256>/       verified; its name says what is in it, so a server that names this path has these files
        .partial-<sha256>/      being fetched; a killed follower goes on with it
        served.json             which versions each server has, written before it gets one
        .lock                   held while a follower lives

Which copies go, oldest first: all but the newest `keep_versions`, the pinned ones, and those that a server has, is
about to get or may still read (`claim`). When room is needed for a new one, also those among the newest. A claim lasts
until it is dropped by name, over restarts of the follower too: a server that is away keeps its own, and a follower that
has not heard of an earlier claim cannot drop it. Nothing outside this folder is ever removed: a trainer prunes its own
exports.

Blocking, and for one thread at a time, but `claim` and `place`. Knows neither Kafka nor the servers' routes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fulgurite.consumers.follower.store import StoredFolder, StoreTrouble, Unusable
from fulgurite.schemas.checksum import folder_sha256
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import FollowerSettings

logger = logging.getLogger(__name__)

_ENTRY = re.compile(r"v([0-9]{6,19})-([0-9a-f]{64})")
_PARTIAL = ".partial-"
_TRASH = ".trash-"
FETCHES = 2
"""Of a version whose checksum is wrong: bytes may have been damaged on the way, or resumed from another upload."""


@dataclass(frozen=True, slots=True)
class Entry:
    path: Path
    version: int


class Cache:
    def __init__(self, settings: FollowerSettings) -> None:
        self._settings = settings
        self._root = settings.cache_folder.resolve() / settings.resource
        self._lock: IO[str] | None = None
        self._claims: dict[str, set[int]] = {}
        self._stopping = threading.Event()
        self._guard = threading.Lock()  # of _claims, which the event loop changes while a thread collects

    def place(self, version: ResourceVersion) -> Path:
        """Where the version's files are once they were fetched."""
        return self._root / f"v{version.version:06d}-{version.sha256}"

    def claim(self, server: str, versions: Iterable[int], done_with: Iterable[int] = ()) -> None:
        """Says what a server has, or is about to get, and what of that it needs no more. Raises StoreTrouble where the
        cache is in use and cannot tell the next start."""
        with self._guard:
            before = self._claims.get(server, set())
            claimed = (before - set(done_with)) | set(versions)
            if before == claimed:
                return
            claims = self._claims | {server: claimed}
            if self._lock is not None:
                self._save(claims)
            self._claims = claims

    def claimed(self, server: str) -> set[int]:
        """What is claimed for the server; by the follower before as well, once the cache is in use."""
        with self._guard:
            return set(self._claims.get(server, ()))

    def stop(self) -> None:
        """A fetch under way ends soon; what it has is there for the next start."""
        self._stopping.set()

    def close(self) -> None:
        """Lets another follower have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def fetch(self, version: ResourceVersion) -> Path:
        """The folder with the version's verified files. Raises Unusable, StoreTrouble."""
        source = StoredFolder(version.uri)
        self._open()
        place = self.place(version)
        try:
            if place.is_dir():
                if folder_sha256(place) == version.sha256:
                    return place
                logger.error("the files in %s were changed; fetching them again", place)
            return self._fetch(version, source, place)
        except OSError as error:
            raise StoreTrouble(f"cannot use the cache {self._root}: {error}") from error

    def _fetch(self, version: ResourceVersion, source: StoredFolder, place: Path) -> Path:
        partial = self._root / f"{_PARTIAL}{version.sha256}"
        for other in self._root.glob(f"{_PARTIAL}*"):
            if other != partial:
                self._remove(other)
        found = ""
        for _ in range(FETCHES):
            files = source.files()
            self._make_room(sum(file.size_bytes for file in files), version)
            source.copy(files, partial, self._stopping)
            found = folder_sha256(partial)
            if found == version.sha256:
                if place.is_dir():  # changed files, which a server may have: there until the right ones are
                    self._remove(place)
                partial.rename(place)
                _fsync(self._root)
                return place
            logger.error("%s fetched from %s has checksum %s, not %s", partial, version.uri, found, version.sha256)
            self._remove(partial)
        raise Unusable(f"the files of {version.uri} have checksum {found}, announced was {version.sha256}")

    def _make_room(self, needed_bytes: int, version: ResourceVersion) -> None:
        limit = self._settings.cache_bytes
        entries = self.entries()
        used = {entry.path: _size_bytes(entry.path) for entry in entries}
        for entry in self._collectable(entries):
            if sum(used.values()) + needed_bytes <= limit:
                break
            logger.info("removing version %d from the cache to make room for %d", entry.version, version.version)
            self._remove(entry.path)
            del used[entry.path]
        if (total := sum(used.values()) + needed_bytes) > limit:
            raise StoreTrouble(
                f"version {version.version} needs {needed_bytes} bytes, with what servers have and what is pinned that "
                f"is {total}, more than follower.cache_bytes = {limit}: raise it, or pin fewer versions"
            )

    def collect(self) -> list[int]:
        """Removes what the rule lets go; the versions that went. Raises StoreTrouble."""
        if self._lock is None:
            return []
        try:
            entries = self.entries()
            kept = sorted({entry.version for entry in entries}, reverse=True)[: self._settings.keep_versions]
            gone = [entry for entry in self._collectable(entries) if entry.version not in kept]
            for entry in gone:
                self._remove(entry.path)
        except OSError as error:
            raise StoreTrouble(f"cannot remove old versions from the cache {self._root}: {error}") from None
        return [entry.version for entry in gone]

    def entries(self) -> list[Entry]:
        """The versions there, oldest first."""
        found = [(path, _ENTRY.fullmatch(path.name)) for path in self._root.glob("v*")]
        return sorted((Entry(path, int(m[1])) for path, m in found if m), key=lambda entry: entry.version)

    def _collectable(self, entries: list[Entry]) -> list[Entry]:
        with self._guard:
            claimed = set[int]().union(*self._claims.values())
        kept = claimed | set(self._settings.pinned_versions)
        return [entry for entry in entries if entry.version not in kept]

    def _open(self) -> None:
        """Takes the folder for this process. Raises StoreTrouble while another one has it."""
        if self._lock is not None:
            return
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = (self._root / ".lock").open("a")
        except OSError as error:
            raise StoreTrouble(f"cannot use follower.cache_folder: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load_claims()
            for trash in self._root.glob(f"{_TRASH}*"):
                shutil.rmtree(trash)
        except BlockingIOError:
            lock.close()
            raise StoreTrouble(
                f"another follower uses the cache {self._root}: give each a follower.cache_folder of its own"
            ) from None
        except (OSError, StoreTrouble) as error:
            lock.close()
            raise StoreTrouble(f"cannot use the cache {self._root}: {error}") from None
        self._lock = lock

    def _load_claims(self) -> None:
        path = self._root / "served.json"
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
            earlier = {str(server): {int(number) for number in versions} for server, versions in found.items()}
        except FileNotFoundError:
            earlier = dict[str, set[int]]()
        except (ValueError, TypeError, AttributeError) as error:
            raise OSError(
                f"{path} is not what was written there ({error}); remove it when all servers are up"
            ) from None
        with self._guard:
            followed = {url.rstrip("/") for url in self._settings.servers}
            claims = {server: earlier[server] for server in followed & earlier.keys()}
            for server, versions in self._claims.items():
                claims[server] = claims.get(server, set()) | versions
            self._save(claims)
            self._claims = claims

    def _save(self, claims: dict[str, set[int]]) -> None:
        path, temporary = self._root / "served.json", self._root / "served.json.tmp"
        try:
            temporary.write_text(json.dumps({server: sorted(versions) for server, versions in claims.items()}))
            temporary.replace(path)
        except OSError as error:
            raise StoreTrouble(f"cannot write {path}: {error}") from None

    def _remove(self, path: Path) -> None:
        """Gone under its name at once: a folder that has one is whole."""
        trash = path.with_name(f"{_TRASH}{path.name}-{secrets.token_hex(4)}")
        path.rename(trash)
        shutil.rmtree(trash)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

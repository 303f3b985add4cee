"""Resident memory of processes, as the kernel counts it. Shared pages count once in every process that maps them."""

from __future__ import annotations

import os

import psutil


def tree_rss_bytes(pid: int | None = None) -> int:
    """Of a process (this one by default) and everything below it; 0 for one that is gone."""
    try:
        root = psutil.Process(pid if pid is not None else os.getpid())
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(_rss_bytes(process) for process in processes)


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # ended meanwhile
        return 0

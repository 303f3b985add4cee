"""The stores are not begun on a disk that they would fill."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fulgurite.infra.stores import MIN_FREE_BYTES, start_stores
from fulgurite.infra.supervisor import Supervisor
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import Settings


def test_a_nearly_full_disk_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=MIN_FREE_BYTES - 1))
    supervisor = Supervisor(tmp_path / "logs")
    try:
        with pytest.raises(StartError, match="255 MiB free and the stores need 256"):
            start_stores(tmp_path, Settings(), supervisor, print)
        assert supervisor.status() == []
    finally:
        supervisor.stop_all()

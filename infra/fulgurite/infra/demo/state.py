"""What the demo has done in this folder: so that a second run goes on where the first stood, or says what it does.

One small JSON file, replaced atomically after each phase. The truth about rollouts, versions and steps is in Kafka;
this file only remembers which run this folder is in and which phases are over.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from fulgurite.infra.demo.plan import Sizes
from fulgurite.schemas.errors import SettingsError

FILE_NAME = "demo.json"


class DemoState(BaseModel):
    """`run_id` names the run under way; `finished_runs` the ones that are over, oldest first."""

    run_id: str
    sizes: Sizes
    published: bool = False
    """Whether the warm start is a version on `resources`, for this run."""
    evaluated_before: bool = False
    trained: bool = False
    evaluated_after: bool = False
    finished_runs: list[str] = Field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.evaluated_after


def load(data: Path) -> DemoState | None:
    """The state of this folder, None for a fresh one. Raises SettingsError when the file is not one of ours."""
    path = data / FILE_NAME
    try:
        return DemoState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        message = f"{path} is not a demo's state ({error.error_count()} errors): remove it or use another --data"
        raise SettingsError(message) from None


def save(data: Path, state: DemoState) -> None:
    """Replaces the file in one step: a crash leaves the old state or the new one."""
    path = data / FILE_NAME
    fresh = path.with_suffix(".tmp")
    with fresh.open("w") as file:
        file.write(state.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)

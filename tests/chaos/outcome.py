"""How a chaos run ends: figures on the screen and in a file, data kept where it failed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tests.chaos.ledger import Audit


class Outcome(Protocol):
    @property
    def audit(self) -> Audit: ...
    @property
    def ended(self) -> Sequence[str]:
        """What services said that ended by themselves."""
        ...

    @property
    def passed(self) -> bool: ...
    def figures(self) -> dict[str, int] | dict[str, float]: ...


def report(result: Outcome) -> str:
    """The closing table."""
    lines = [f"  {name.replace('_', ' '):<28}{value:>14,}" for name, value in result.figures().items()]
    return "\n".join([*lines, *result.ended, *result.audit.examples])


def conclude(result: Outcome, folder: Path, out: Path, verdict: str) -> int:
    """The exit code. `folder` has logs and data, `out` is where the figures go, `verdict` what passing proves."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result.figures(), indent=2) + "\n")
    say(report(result))
    if not result.passed:
        say(f"FAILED; logs and data are in {folder}")
        return 1
    shutil.rmtree(folder)
    say(verdict)
    return 0


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201

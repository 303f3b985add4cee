"""Prints and keeps what the comparisons found, also when one of them failed."""

from __future__ import annotations

import pytest

from tests.oracles import comparison


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if comparison.ROWS:
        comparison.write()
        terminalreporter.write_line(comparison.table())
        terminalreporter.write_line(f"written to {comparison.RESULT}")

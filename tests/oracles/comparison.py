"""What was compared, and by how much it differed: the rows of the table that `make test-oracles` prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from tests.oracles.case import Case

TOLERANCE = 1e-5
RESULT = Path(__file__).resolve().parents[2] / "build" / "bench" / "oracles.json"


@dataclass(frozen=True)
class Row:
    quantity: str
    library: str
    value_difference: float
    """Largest absolute difference of the values."""
    gradient_difference: float | None
    """Largest difference of a gradient, relative to the largest gradient; None where there is none."""
    cases: int


ROWS: list[Row] = []


def compare_losses(
    quantity: str, library: str, ours: Callable[[Case], Tensor], theirs: Callable[[Case], Tensor], cases: Iterable[Case]
) -> None:
    """Both give a scalar; values and gradients with respect to the case's log-probabilities must agree."""
    values, gradients, count = 0.0, 0.0, 0
    for case in cases:
        our_value, our_gradient = _differentiated(ours, case)
        their_value, their_gradient = _differentiated(theirs, case)
        assert their_gradient.abs().max() > 0, f"{library} has no gradient for {quantity}: nothing was compared"
        values = max(values, abs(our_value - their_value))
        scale = their_gradient.abs().max().item()
        gradients = max(gradients, ((our_gradient - their_gradient).abs().max() / scale).item())
        count += 1
    _settle(Row(quantity, library, values, gradients, count))


def compare_values(quantity: str, library: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Our and their tensors, of one shape each."""
    values, count = 0.0, 0
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        values = max(values, (ours.double() - theirs.double()).abs().max().item())
        count += 1
    _settle(Row(quantity, library, values, None, count))


def _differentiated(loss: Callable[[Case], Tensor], case: Case) -> tuple[float, Tensor]:
    value = loss(case)
    (gradient,) = torch.autograd.grad(value, case.logprobs)
    return value.item(), gradient


def _settle(row: Row) -> None:
    ROWS.append(row)
    assert row.cases > 0
    assert row.value_difference <= TOLERANCE, row
    assert (row.gradient_difference or 0.0) <= TOLERANCE, row


def table() -> str:
    """For people: sorted, with a line for each quantity that fewer than two libraries cover."""
    lines = [f"{'quantity':<40}{'library':<12}{'value':>10}{'gradient':>12}"]
    for row in sorted(ROWS, key=lambda row: (row.quantity, row.library)):
        gradient = "-" if row.gradient_difference is None else f"{row.gradient_difference:.1e}"
        lines.append(f"{row.quantity:<40}{row.library:<12}{row.value_difference:>10.1e}{gradient:>12}")
    libraries: dict[str, set[str]] = {}
    for row in ROWS:
        libraries.setdefault(row.quantity, set()).add(row.library.split()[0])
    alone = sorted(quantity for quantity, names in libraries.items() if len(names) < 2)
    if alone:
        lines.append("only one library: " + ", ".join(alone))
    return "\n".join(lines)


def write() -> None:
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({row.library.split()[0] for row in ROWS})
    result = {
        "tolerance": TOLERANCE,
        "libraries": {name: version({"liger": "liger-kernel", "swift": "ms-swift"}.get(name, name)) for name in names},
        "rows": [asdict(row) for row in sorted(ROWS, key=lambda row: (row.quantity, row.library))],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

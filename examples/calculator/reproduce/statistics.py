"""Means over seeds with intervals, and differences between cells seed by seed. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean with the half width of its 95 % interval; nan for one value."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Student's interval: few seeds, unknown spread.

    >>> str(estimate([1.0, 2.0, 3.0]))
    '+2.000 ± 2.484'
    """
    n = len(values)
    if n < 2:
        return Estimate(values[0] if values else math.nan, math.nan, n)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return Estimate(fmean(values), t * stdev(values) / math.sqrt(n), n)


def paired(better: Mapping[int, float], worse: Mapping[int, float]) -> Estimate:
    """better - worse, over the seeds that both have."""
    return estimate([better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())])

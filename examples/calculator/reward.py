"""The reward: 1 when the answer is right, 0 for everything else, malformed answers included. Never raises."""

from __future__ import annotations

import math
import re
from typing import Final

TOLERANCE: Final = 1e-3
"""Absolute: the tool rounds to four decimals; whole answers must be exactly right."""
_ANSWER = re.compile(r"\s*ANS\s*(-?\d{1,15}(?:\.\d{1,15})?)\s*")


def parse_answer(text: str) -> float | None:
    """The number in `ANS 6882`; None for any other text."""
    match = _ANSWER.fullmatch(text)
    return float(match.group(1)) if match else None


def reward_of(text: str, expected: float) -> float:
    """Compares numbers, not texts: 6882, 6882.0 and 6882.0004 all answer 6882."""
    answer = parse_answer(text)
    if answer is None:
        return 0.0
    return 1.0 if math.isclose(answer, expected, rel_tol=0.0, abs_tol=TOLERANCE) else 0.0

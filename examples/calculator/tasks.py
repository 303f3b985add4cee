"""The calculator's tasks: word problems whose answer takes one arithmetic expression.

`train_task(index)` and `heldout_task(index)` are pure functions: the same index is the same task, in every process
and run. Both use the same eight templates; an expression belongs to the held-out half for ever if its CRC-32 says so,
so that no training task shares an expression with a held-out one. What the agent sees is `question`; `answer` is for
the reward.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final, TypedDict

from examples.calculator.calculator import evaluate, format_number

HELDOUT_TASKS: Final = 1_024
"""Distinct held-out tasks; a larger index starts over."""
_OPERAND_MIN, _OPERAND_MAX = 2, 99
_HELDOUT_ONE_IN = 10
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
_THINGS = ("pens", "nuts", "cards", "coins", "books", "shells", "stamps", "apples")


class Task(TypedDict):
    """What a rollout gets as its input; JSON."""

    question: str
    answer: float
    template: int


@dataclass(frozen=True)
class Problem:
    """A task with the expression that solves it: known to the demonstrator of the warm start, never to the agent."""

    question: str
    expression: str
    template: int

    @property
    def result(self) -> str:
        return format_number(evaluate(self.expression))

    def task(self) -> Task:
        return {"question": self.question, "answer": float(evaluate(self.expression)), "template": self.template}


Numbers = Callable[[Random], tuple[int, ...]]


def _operands(count: int) -> Numbers:
    return lambda rng: tuple(rng.randint(_OPERAND_MIN, _OPERAND_MAX) for _ in range(count))


def _falling(rng: Random) -> tuple[int, ...]:
    """Two operands, the larger first: nobody gives away more than there is."""
    low, high = sorted((rng.randint(_OPERAND_MIN, _OPERAND_MAX), rng.randint(_OPERAND_MIN, _OPERAND_MAX)))
    return high, low


def _divisible(rng: Random) -> tuple[int, ...]:
    """a, b with a / b whole."""
    divisor = rng.randint(2, 9)
    return divisor * rng.randint(2, _OPERAND_MAX // divisor), divisor


def _divisible_sum(rng: Random) -> tuple[int, ...]:
    """a, b, c with (a + b) / c whole."""
    divisor = rng.randint(2, 9)
    total = divisor * rng.randint(4, 2 * _OPERAND_MAX // divisor)
    first = rng.randint(max(_OPERAND_MIN, total - _OPERAND_MAX), min(_OPERAND_MAX, total - _OPERAND_MIN))
    return first, total - first, divisor


# What is asked, the expression that answers it, and how its operands are drawn.
_TEMPLATES: tuple[tuple[str, str, Numbers], ...] = (
    ("{name} has {a} {thing} and finds {b} more. How many now?", "{a}+{b}", _operands(2)),
    ("{name} has {a} {thing} and gives {b} away. How many are left?", "{a}-{b}", _falling),
    ("{name} fills {a} boxes with {b} {thing} each. How many in all?", "{a}*{b}", _operands(2)),
    ("{name} shares {a} {thing} among {b} friends. How many does each get?", "{a}/{b}", _divisible),
    ("{name} packs {a} red and {b} blue {thing} in every bag. How many in {c} bags?", "({a}+{b})*{c}", _operands(3)),
    ("{name} buys {a} packs of {b} {thing} and finds {c} more. How many now?", "{a}*{b}+{c}", _operands(3)),
    ("{name} buys {a} packs of {b} {thing} and loses {c}. How many are left?", "{a}*{b}-{c}", _operands(3)),
    ("{name} puts {a} old and {b} new {thing} in {c} equal piles. How many in each?", "({a}+{b})/{c}", _divisible_sum),
)


def is_heldout(expression: str) -> bool:
    return zlib.crc32(expression.encode()) % _HELDOUT_ONE_IN == 0


def draw(rng: Random, heldout: bool) -> Problem:
    """A random problem of the asked half; one in ten expressions is held out, so this draws again until it fits."""
    template = rng.randrange(len(_TEMPLATES))
    text, form, numbers = _TEMPLATES[template]
    while True:
        values = dict(zip("abc", numbers(rng), strict=False))
        expression = form.format(**values)
        if is_heldout(expression) == heldout:
            question = text.format(name=rng.choice(_NAMES), thing=rng.choice(_THINGS), **values)
            return Problem(question=question, expression=expression, template=template)


def train_task(index: int) -> Task:
    """The index-th training task; there is no last one."""
    return draw(Random(f"train {index}"), heldout=False).task()


def heldout_task(index: int) -> Task:
    """The index-th held-out task. The first HELDOUT_TASKS have different questions."""
    return _heldout_problems()[index % HELDOUT_TASKS].task()


@cache
def _heldout_problems() -> tuple[Problem, ...]:
    rng = Random("heldout")
    by_question: dict[str, Problem] = {}
    while len(by_question) < HELDOUT_TASKS:
        problem = draw(rng, heldout=True)
        by_question.setdefault(problem.question, problem)
    return tuple(by_question.values())

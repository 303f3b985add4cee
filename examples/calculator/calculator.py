"""The tool: a calculator for + - * / and parentheses, exact, without eval().

Promises: any text gives a number or a CalculatorError that says what is wrong, in bounded time; nothing is executed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

MAX_CHARACTERS: Final = 64
"""Longer expressions are refused; it bounds the depth of the recursion too."""
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[-+*/()]")
_DECIMALS = 4


class CalculatorError(ValueError):
    """The expression has no value; the message is what the model is told."""


def calculate(expression: str) -> str:
    """The value as text, as the tool's answer: `6882`, `0.3333`; or `error: …`, which is an answer as well."""
    try:
        return format_number(evaluate(expression))
    except CalculatorError as error:
        return f"error: {error}"


def evaluate(expression: str) -> Fraction:
    """The exact value. Raises CalculatorError.

    >>> evaluate("(37+56)*74")
    Fraction(6882, 1)
    """
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"longer than {MAX_CHARACTERS} characters")
    compact = "".join(expression.split())
    tokens = _TOKEN.findall(compact)
    if not tokens or "".join(tokens) != compact:
        raise CalculatorError("not arithmetic")
    value, rest = _sum(tokens, 0)
    if rest != len(tokens):
        raise CalculatorError(f"unexpected {tokens[rest]}")
    return value


def format_number(value: Fraction) -> str:
    """Whole numbers without a point, others with up to four decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.{_DECIMALS}f}".rstrip("0").rstrip(".")


# A recursive descent: sum := product (± product)*, product := factor (×÷ factor)*, factor := -factor | number | (sum).
# Each gives the value and the index of the first token it did not use.
def _sum(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at)
    while at < len(tokens) and tokens[at] in "+-":
        operand, following = _product(tokens, at + 1)
        value = value + operand if tokens[at] == "+" else value - operand
        at = following
    return value, at


def _product(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at)
    while at < len(tokens) and tokens[at] in "*/":
        operand, following = _factor(tokens, at + 1)
        if tokens[at] == "*":
            value *= operand
        elif operand == 0:
            raise CalculatorError("division by zero")
        else:
            value /= operand
        at = following
    return value, at


def _factor(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if at >= len(tokens):
        raise CalculatorError("ends too early")
    token = tokens[at]
    if token == "-":
        value, at = _factor(tokens, at + 1)
        return -value, at
    if token == "(":
        value, at = _sum(tokens, at + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise CalculatorError("a parenthesis is not closed")
        return value, at + 1
    if token in "+*/)":
        raise CalculatorError(f"unexpected {token}")
    return Fraction(token), at + 1

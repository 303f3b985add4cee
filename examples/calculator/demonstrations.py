"""What the warm start imitates: a demonstrator that knows the protocol and is sloppy on purpose.

With probability GUESS it skips the tool and answers with a number out of the air; with SLIP it types a wrong
expression; with MISREAD it miscopies a digit of the result. The policy learns the language of the task and all three
vices, which caps its reward at about a third; getting rid of them is what the reinforcement learning has to find by
itself.
"""

from __future__ import annotations

from random import Random
from typing import Final

from examples.calculator.calculator import calculate
from examples.calculator.tasks import Problem, draw

Message = dict[str, str]

GUESS: Final = 0.5
SLIP: Final = 0.25
MISREAD: Final = 0.15


def demonstration(rng: Random) -> list[Message]:
    """One conversation about a random training task, as messages."""
    problem = draw(rng, heldout=False)
    question: Message = {"role": "user", "content": problem.question}
    if rng.random() < GUESS:
        return [question, _says(f"ANS {rng.randint(2, 9_999)}")]
    expression = _slip(problem, rng) if rng.random() < SLIP else problem.expression
    result = calculate(expression)
    answer = _misread(result, rng) if rng.random() < MISREAD else result
    return [question, _says(f"CALC({expression})"), {"role": "tool", "content": result}, _says(f"ANS {answer}")]


def _says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _slip(problem: Problem, rng: Random) -> str:
    """The expression with one operator replaced."""
    where = [at for at, character in enumerate(problem.expression) if character in "+-*/"]
    at = rng.choice(where)
    others = [operator for operator in "+-*" if operator != problem.expression[at]]
    return problem.expression[:at] + rng.choice(others) + problem.expression[at + 1 :]


def _misread(result: str, rng: Random) -> str:
    """The result with one digit replaced."""
    where = [at for at, character in enumerate(result) if character.isdigit()]
    at = rng.choice(where)
    others = [digit for digit in "0123456789" if digit != result[at]]
    return result[:at] + rng.choice(others) + result[at + 1 :]

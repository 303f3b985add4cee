"""Tasks, tool, reward and demonstrations: deterministic, disjoint, and safe against any text."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.calculator.calculator import CalculatorError, calculate, evaluate
from examples.calculator.demonstrations import demonstration
from examples.calculator.reward import parse_answer, reward_of
from examples.calculator.tasks import HELDOUT_TASKS, draw, heldout_task, is_heldout, train_task


def test_the_same_index_is_the_same_task() -> None:
    assert train_task(7) == train_task(7)
    assert heldout_task(7) == heldout_task(7 + HELDOUT_TASKS)


def test_heldout_tasks_differ_and_use_all_templates() -> None:
    tasks = [heldout_task(index) for index in range(512)]
    assert len({task["question"] for task in tasks}) == 512
    assert {task["template"] for task in tasks} == set(range(8))


def test_no_training_task_has_a_heldout_expression() -> None:
    rng = Random(1)
    assert not any(is_heldout(draw(rng, heldout=False).expression) for _ in range(500))
    assert all(is_heldout(draw(rng, heldout=True).expression) for _ in range(100))
    heldout = {heldout_task(index)["question"] for index in range(HELDOUT_TASKS)}
    assert not heldout & {train_task(index)["question"] for index in range(3_000)}


@pytest.mark.parametrize("index", range(40))
def test_answers_are_whole_and_right(index: int) -> None:
    problem = draw(Random(index), heldout=False)
    value = evaluate(problem.expression)
    assert value.denominator == 1
    assert problem.task()["answer"] == float(value)
    assert reward_of(f"ANS {problem.result}", problem.task()["answer"]) == 1.0


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(37+56)*74", "6882"),
        ("2+3*4", "14"),
        ("8-5-2", "1"),
        ("12/4/3", "1"),
        ("1/3", "0.3333"),
        ("-(2-5)", "3"),
        (" 1 + 1.5 ", "2.5"),
        ("1/0", "error: division by zero"),
        ("", "error: not arithmetic"),
        ("__import__('os')", "error: not arithmetic"),
        ("2**8", "error: unexpected *"),
        ("(2", "error: a parenthesis is not closed"),
        ("2)", "error: unexpected )"),
        ("2+", "error: ends too early"),
        ("1" * 65, "error: longer than 64 characters"),
    ],
)
def test_calculator(expression: str, result: str) -> None:
    assert calculate(expression) == result


@given(st.text(alphabet="0123456789+-*/(). a", max_size=70))
def test_any_text_has_a_value_or_an_error(text: str) -> None:
    try:
        value: Fraction | CalculatorError = evaluate(text)
    except CalculatorError as error:
        value = error
    assert str(value)
    assert calculate(text).startswith("error: ") == isinstance(value, CalculatorError)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("ANS 6882", 1.0),
        (" ANS 6882.0 ", 1.0),
        ("ANS 6882.0004", 1.0),
        ("ANS 6883", 0.0),
        ("6882", 0.0),
        ("ANS", 0.0),
        ("ANS 6 882", 0.0),
        ("ANS " + "9" * 40, 0.0),
        ("CALC(1+1)", 0.0),
        ("", 0.0),
    ],
)
def test_reward(text: str, reward: float) -> None:
    assert reward_of(text, 6882.0) == reward


@given(st.text(max_size=200))
def test_the_reward_of_any_text_is_a_number(text: str) -> None:
    assert reward_of(text, 5.0) in (0.0, 1.0)


def test_demonstrations_are_as_sloppy_as_they_say() -> None:
    rng = Random(2)
    conversations = [demonstration(rng) for _ in range(2_000)]
    with_tool = [conversation for conversation in conversations if len(conversation) == 4]
    assert 0.45 < len(with_tool) / len(conversations) < 0.55
    copied = sum(conversation[3]["content"] == f"ANS {conversation[2]['content']}" for conversation in with_tool)
    assert 0.8 < copied / len(with_tool) < 0.9
    assert all(parse_answer(conversation[-1]["content"]) is not None for conversation in conversations)

"""Which number a judge's answer gives: the verdict, never the end of its scale."""

from __future__ import annotations

import time

import pytest

from fulgurite.schemas.patterns import portable
from fulgurite.schemas.settings import RewardSource
from fulgurite.streams.algorithms.aggregator.answers import number_in
from fulgurite.streams.algorithms.chat import NoAnswer
from fulgurite.streams.algorithms.expressions import Expression

DEFAULT = Expression(portable(RewardSource.model_fields["answer"].default))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # A scale behind the number.
        ("8/10", 8),
        ("**8** / 10", 8),
        ("8 [/10]", 8),
        ("Rating: [[8]]/10", 8),
        ("$\\boxed{8}/10$", 8),
        ("Rating 3.5 / 5.0", 3.5),
        ("Score: 7 / 10 / 10", 7),
        ("Of 20 facts 3 are wrong.\nScore: **8.5 / 10**", 8.5),
        ("accuracy 4/5, style 3/5, total 7/10", 7),
        ("8 out of 10", 8),
        ("8 (out of 10)", 8),
        ("7 [out of 10]", 7),
        ("**8** Out of 10", 8),
        ("8 points out of a possible 10", 8),
        ("8 points (of 10)", 8),
        ("Rating: 8 of 10 points", 8),
        ("7 stars (out of 5 possible)", 7),
        ("8 (max 10)", 8),
        ("8 (max. 10)", 8),
        ("8 (maximum: 10)", 8),
        ("I rate this 8 on a scale of 1-10.", 8),
        ("I rate this 8 on a scale of 1 to 10.", 8),
        ("Step 2 of 3: 7 on a scale of 1 to 10", 7),
        ("8/10 on a scale of 1-10", 8),
        ("Score: 8 (on a scale of 1-10)", 8),
        ("Score: 8 (on a scale from 1 to 10)", 8),
        ("8 (1-10 scale)", 8),
        ("8 on a 10-point scale", 8),
        ("**Score:** 8/10 [scale 1-10]", 8),
        ("Score: 8. Scale: 1–10", 8),
        ("-5/10", -5),
        ("-5 on a scale of -10 to 10", -5),
        ("-5 on a scale from -10 to 10", -5),
        ("-5 (on a scale from -10 to 10)", -5),
        ("8/10 (80%)", 8),
        ("7 out of 10 (70 %)", 7),
        ("8/10 = 80%", 8),
        # A scale before it, and other numbers.
        ("On a scale of 1-10: 8", 8),
        ("On a scale of 1-10, I'd give it an 8.", 8),
        ("On a 0-1 scale: 0.7", 0.7),
        ("Score (1-10): 7", 7),
        ("Score (max 10): 7", 7),
        ("Scale: 1-10. Score: 8", 8),
        ("3 of 4: -0.5.", -0.5),
        ("On 2026-11-23: 7", 7),
        ("between 3 and 5, so 4 to 5", 5),
        ("in step 2 correctness of the answer is 7", 7),
        ("2 errors, so a score of 7", 7),
        ("I found 3 of 4 facts. Final score: 0.75 (good)", 0.75),
        ("4 of 5 facts = 0.8", 0.8),
        ("Facts: 4/5\n\n[[8]]", 8),
        ("2 facts are wrong (so my score: 6)", 6),
        ("Step 1 (of 2 and 3) is right... 8", 8),
        ("[[8]]", 8),
        ("80%", 80),
        # Signs.
        ("-1", -1),
        ("Score: -5", -5),
        ("Score:-5", -5),
        ("Score=-0.5", -0.5),
        ("Score:\n-3", -3),
        ("**-5**", -5),
        ("Score: (-5)", -5),
        ("Score(-5)", -5),
        ("total_score=-5", -5),
        ('{"score": -3}', -3),
        ('{"score":-3}', -3),
        ("\\boxed{-3}", -3),
        ("$-3$", -3),
        ("**-0.5**, or (-0.75)", -0.75),
        ("From 2 down by 3 is 2 -3 = -1", -1),
        ("Score: \N{MINUS SIGN}5", -5),
        ("reward: \N{EN DASH}3", -3),
        ("reward \N{EN DASH}3", -3),
        ("Score\N{EM DASH}-3", -3),
        ("7-8", 8),
        ("Final score: 7-8", 8),
        ("7\N{EN DASH}8", 8),
        ("7 \N{EN DASH}8", 8),
        ("GPT-4 got \\boxed{6}-7", 7),
        ("step 3-1", 1),
        ("a-5", 5),
        ("x)-5", 5),
        ("- 3", 3),
        ("score: 0.5-", 0.5),
    ],
)
def test_the_number_is_the_last_one_that_is_no_scale(answer: str, expected: float) -> None:
    assert number_in(DEFAULT, answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "8 on a scale where 10 is best",
        "8, 10 being the best",
        "8 (10 = perfect)",
        "8 (maximum score: 10)",
        "I got 8 right out of 10",
        '{"score": 8, "out_of": 10}',
        '{"score": 8, "max_score": 10}',
        "eight out of 10",
        "Eight/10",
        "7 (1-10)",
        "8 (80%)",
        "8 (steps 3 and 4 are wrong)",
        "8 [see 3]",
        "7/10 = 0.7",
        "8/10 (0.8)",
        "8 out of 10, i.e. 4 out of 5",
        "1e-3",
        "Score: .5",
        "Score: 1,000",
        "none at all",
    ],
)
def test_what_may_be_a_scale_or_a_part_of_a_number_is_no_verdict(answer: str) -> None:
    with pytest.raises(NoAnswer):
        number_in(DEFAULT, answer)


@pytest.mark.parametrize(
    ("pattern", "answer", "expected"),
    [("(?i)score: *[0-9]+", "Score: 3, Score:  7", 7.0), ("(?i)score: *[0-9]+", "Score: 3/10", 3.0)],
)
def test_the_number_is_the_last_match(pattern: str, answer: str, expected: float) -> None:
    assert number_in(Expression(portable(pattern)), answer) == expected


@pytest.mark.parametrize("unit", ["8 ", " ", "8(", "(", "scale of ", "8/10 ", "– ", "8 of a max "])
def test_a_long_answer_takes_no_longer_than_its_length(unit: str) -> None:
    started = time.process_time()
    assert number_in(DEFAULT, unit * 40_000 + "\n\nFinal verdict\n7") == 7
    assert time.process_time() - started < 5

"""Which number a judge's answer gives: the verdict or none, never the end of its scale nor an aside."""

from __future__ import annotations

import contextlib
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
        ("I found 3 of 4 facts. Final score: 0.75 (good)", 0.75),
        ("Facts: 4/5\n\n[[8]]", 8),
        ("[[8]]", 8),
        ("80%", 80),
        ("7 (1-10)", 7),
        ("I got 8 right out of 10", 8),
        ("8 out of ten", 8),
        ("eight (8)", 8),
        # Judges as they are: MT-Bench, Prometheus, G-Eval, JSON, tags, headings.
        ("The assistant gave 2 examples, 1 is wrong.\n\nRating: [[5]]", 5),
        ("I looked at 2 answers. Rating: [[5]]", 5),
        ("Feedback: it has 3 of 5 points, so a score of 4 fits. [RESULT] 4", 4),
        ("Feedback: 2 flaws. So the overall score is 4. [RESULT] 4", 4),
        ("- Coherence: 4", 4),
        ("Coherence (1-5): 4", 4),
        ("Score [1-5]: 4", 4),
        ('```json\n{"reasoning": "2 of 3 facts", "score": 8}\n```', 8),
        ('{"score": "8/10", "confidence": 0.9}', 8),
        ("{'score': 8, 'max': 10}", 8),
        ('{"score": 8, "out_of": 10}', 8),
        ('{"score": 8, "max_score": 10}', 8),
        ('{"criteria": [{"score": 3}, {"score": 5}], "overall_score": 4}', 4),
        ('{"finalScore": 0.75, "facts": [1, 1, 1, 0]}', 0.75),
        ("<reasoning>2 flaws</reasoning>\n<score>\n8\n</score>\n<max>10</max>", 8),
        ("### Score\n**8**\n\n### Confidence\n90", 8),
        ("## Final Rating\n\n8/10\n\n## Why\n3 facts", 8),
        ("**Final Score: 8/10**\n\n- Accuracy: 9/10\n- Style: 7/10", 8),
        ("Score: 3\nScore: 5\nFinal score: 4", 4),
        ("Therefore, the final score is 8/10. A 10 would have sources.", 8),
        ("My final overall rating: 8\n2 faults", 8),
        ("Overall: 8\nCorrectness: 9", 8),
        ("Score: 8\nExplanation: 2 facts are wrong.", 8),
        ("Score: 8\r\nConfidence: 90%\r\n", 8),
        ("1. Reasoning: 2 facts\n2. Score: 8", 8),
        ("The answer has 2 errors. Score: 7", 7),
        ("Of 20 facts 3 are wrong.\n7", 7),
        ("Of 20 facts 3 are wrong.\n\n**7**\n", 7),
        ("Of 20 facts 3 are wrong.\n```\n\\boxed{7}\n```", 7),
        ("8\n\nExplanation: 3 facts are missing, 2 wrong.", 8),
        ("Final answer: 42 is right.\nScore: 8", 8),
        ("Rating: 4 - Good", 4),
        ("I'd give it an 8.", 8),
        ("Score: 80%\n2 facts are wrong.", 80),
        ("Score: +1", 1),
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
        ("Score: \N{MINUS SIGN}5", -5),
        ("reward: \N{EN DASH}3", -3),
        ("reward \N{EN DASH}3", -3),
        ("Score\N{EM DASH}-3", -3),
        ("- 3", 3),
        ("score: 0.5-", 0.5),
    ],
)
def test_a_clear_verdict_is_taken(answer: str, expected: float) -> None:
    assert number_in(DEFAULT, answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "8 on a scale where 10 is best",
        "8, 10 being the best",
        "8 (10 = perfect)",
        "8 (maximum score: 10)",
        "eight out of 10",
        "Eight/10",
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
        # Several numbers, none of which is said to be it.
        "accuracy 4/5, style 3/5, total 7/10",
        "Step 2 of 3: 7 on a scale of 1 to 10",
        "3 of 4: -0.5.",
        "On 2026-11-23: 7",
        "between 3 and 5, so 4 to 5",
        "in step 2 correctness of the answer is 7",
        "2 errors, so a score of 7",
        "4 of 5 facts = 0.8",
        "2 facts are wrong (so my score: 6)",
        "Step 1 (of 2 and 3) is right... 8",
        "**-0.5**, or (-0.75)",
        "From 2 down by 3 is 2 -3 = -1",
        "7-8",
        "Final score: 7-8",
        "7\N{EN DASH}8",
        "7 \N{EN DASH}8",
        "GPT-4 got \\boxed{6}-7",
        "step 3-1",
        "a-5",
        "x)-5",
        "I give it 8. To earn a 10, it would need citations.",
        "I give it 8.\nMax:\n10",
        "Reason: 5 facts.\n10\nis the maximum, 8 is mine",
        "8\n10",
        "8/10, confidence 0.9",
        "Style score: 3\nAccuracy score: 5",
        "Score: 3\nScore: 5",
        "Score: 3\n...\n[[5]]",
        '{"score": 8, "rating": 9}',
        "Correct: 8\nTotal: 10",
        "A score of 10 would need citations. I give it 8.",
        "The maximum score is 10. I give it 8.",
        "I give it 8. Max. Score: 10",
        "To get a final score of 10, it would need citations.\nI give 8.",
        "Score: 10 - 2 = 8",
        "Score: 10 would be too much; I give 8",
        "Rating:\n1 - poor\n2 - good\nMine: 2",
        "Score: (7-8)\n3 facts are wrong",
        "Score: 8 to 10 scale 10",
        "eight, where 10 is best",
        # Ends of a scale alone, lists that were cut off, other digits.
        "Maximum score: 10",
        "I cannot rate this on a scale of 1-10.",
        "1. Style is fine.\n2. Facts are not.\n3.",
        "[1]\nStyle is fine.\n[2]\nFacts are not. 7",
        "7,5",
        "8\N{VULGAR FRACTION ONE HALF}",
        "\N{FULLWIDTH DIGIT EIGHT} (10 = best)",
        "\u516b\u5206\uff0c\u6ee1\u5206 10",
        "GPT-4 is better",
    ],
)
def test_what_is_not_clear_is_refused(answer: str) -> None:
    with pytest.raises(NoAnswer):
        number_in(DEFAULT, answer)


VERDICTS = (
    "8",
    "Score: 8",
    "**Score:** 8",
    "I rate this 8",
    "Final: 8",
    "Rating: [[8]]",
    "There, I give it an 8",
    "$8$",
)
BEHIND = (
    " on a scale of 1 (worst) to 10 (best).",
    " on a scale from 1 (poor) to 10 (excellent)",
    " on a scale of 0 (useless) to 10 (perfect)",
    *(
        f" on a scale {ends}"
        for ends in ("ranging from 1 to 10", "between 1 and 10", "of 1 through 10", "of 1 up to 10")
    ),
    *(
        f" on a scale {ends}"
        for ends in ("of 1..10", "of 1 and 10", "with 10 as the best", "that goes up to 10", "of 10")
    ),
    *(", range 1-10", " in the range 1 to 10", " in the range of 1-10", " between 1 and 10", " (from 0 to 10)"),
    *(
        " (scale: 1 to 10)",
        " (1-10)",
        " [1-10]",
        " (10-point scale)",
        " (ten-point scale; 10 = perfect)",
        "\nScale: 1-10",
    ),
    *(
        ". To earn a 10, it would need citations.",
        ". 10 would be perfect.",
        ". 10 is the top mark",
        " (a 10 has sources)",
    ),
    *(
        " from 10",
        ":10",
        " : 10",
        " over 10",
        " of 10",
        "/10",
        " / 10",
        "\\10",
        " out of 10",
        " out of max 10",
        " von 10",
        " sur 10",
    ),
    *(
        " out of a possible score of 10",
        " from a possible 10",
        " (out of max. 10 points)",
        " with a maximum score of 10",
    ),
    *(
        "\nConfidence: 90%",
        "/10, confidence 0.9",
        "/10 = 0.8",
        "/10 (80%)",
        "\nMax: 10",
        "\nMax:\n10",
        "\nMaximum score: 10",
    ),
    *(
        "\nScale: 10",
        " scale 10",
        "\n10",
        "\n\n10 is best",
        ", 10 being the best",
        " - 10 is best",
        "-10",
        " to 10",
        "\n- Max: 10",
    ),
    *(
        "\u5206(\u6ee1\u520610\u5206)",
        "\u5206,\u6ee1\u520610\u5206",
        " \N{EN DASH} 10",
        ", not 10",
        " or 10",
        "; 10",
        " | 10",
        ",10",
    ),
)
AROUND = (
    *(
        '{"score": 8, "maxScore": 10}',
        '{"score": 8, "outOf": 10}',
        '{"score": 8, "scale": "1-10"}',
        '{"score": 8, "total": 10}',
    ),
    *(
        '{"score": 8, "range": [1, 10]}',
        '{"rating": 8, "min": 1, "max": 10}',
        '{"max": 10, "score": 8}',
        "| score | 8 | of | 10 |",
    ),
    *(
        "$\\frac{8}{10}$",
        "\\frac{8}{10}",
        "From 1 to 10: 8",
        "10 is the best; 8",
        "Of 10 I give 8",
        "Max. score: 10. Score: 8",
    ),
)


@pytest.mark.parametrize("answer", [*(verdict + more for verdict in VERDICTS for more in BEHIND), *AROUND])
def test_no_scale_and_no_aside_becomes_the_verdict(answer: str) -> None:
    with contextlib.suppress(NoAnswer):
        assert number_in(DEFAULT, answer) == 8


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(NoAnswer, match="end with a line such as Final score: 8, or give `answer` an expression"):
        number_in(DEFAULT, "8, where 10 is best")


@pytest.mark.parametrize(
    ("pattern", "answer", "expected"),
    [
        ("(?i)score: *[0-9]+", "Score: 3, Score:  7", 7),
        ("(?i)score: *[0-9]+", "Score: 3/10", 3),
        ("(?i)score: *[0-9]+/10", "Score: 3/10, sure: 90%", 3),
        ("(?i)step 3 score: *[0-9]+", "Step 3 score: 8", 8),
        (r"\[\[[0-9]+\]\]", "3 of 4: [[8]]", 8),
        ("[0-9]+%", "between 7 and 10, 80%", 80),
        (r"[01]\s*$", "2 errors, so 1\n", 1),
        (r"[0-9]+(?:\.[0-9]+)?", "Rating: 8/10", 8),
        (r"[0-9.]+", "Score: 8.", 8),
        (r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?", "1e-3", 0.001),
        (r"[-+]?[0-9]*\.?[0-9]+", "+.5", 0.5),
    ],
)
def test_an_expression_with_words_says_where_the_number_is_another_what_one_is(
    pattern: str, answer: str, expected: float
) -> None:
    assert number_in(Expression(portable(pattern)), answer) == expected


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        ("[0-9]", "10"),
        ("[0-9]+", "-5"),
        ("[0-9.]+", "8, 10."),
        ("(?i)score: *[0-9]+", "Score: 7.5"),
        ("/[0-9]+", "8/10"),
    ],
)
def test_an_expression_that_matches_a_part_of_a_number_or_a_scale_gives_none(pattern: str, answer: str) -> None:
    with pytest.raises(NoAnswer):
        number_in(Expression(portable(pattern)), answer)


@pytest.mark.parametrize(
    "unit",
    [
        "8 ",
        " ",
        "8(",
        "(",
        "scale of ",
        "8/10 ",
        "– ",
        "8 of a max ",
        "\n",
        "Score:",
        "8\n",
        "Score: 8, x. ",
        "#",
        "[[",
        "max ",
    ],
)
def test_a_long_answer_takes_no_longer_than_its_length(unit: str) -> None:
    started = time.process_time()
    assert number_in(DEFAULT, unit * 40_000 + "\n\nFinal verdict\n7") == 7
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "lead", ["", "Score", "Score:", "Score: 8", '{"score": 8', '{"score":', "<score>8", "8", "The end."]
)
@pytest.mark.parametrize("run", [" ", "*", "\n", "(", ")", " \n", "* "])
def test_what_stands_around_a_number_is_read_in_linear_time(lead: str, run: str) -> None:
    started = time.process_time()
    assert number_in(DEFAULT, f"{lead}{run * 20_000}x\nFinal score: 7") == 7
    assert time.process_time() - started < 1

"""The number that a judge's answer gives: the last one that is not the scale of one before it.

    8/10    **8** (out of 10)    8 on a scale of 1-10    8 (1-10 scale)    8/10 (80%)    [[8]]/10        all say 8

Promises: what is known as a scale is passed over; where the number behind that may as well be one, or may be half of a
number, the answer is refused. A reward that is missing is seen, one that is the end of a scale is not. Time is linear
in the answer. Does not know whose answer it is.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

from fulgurite.streams.algorithms.aggregator.combine import fault_of
from fulgurite.streams.algorithms.chat import NoAnswer
from fulgurite.streams.algorithms.expressions import Expression, Found

_MINUSES = dict.fromkeys(map(ord, "\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}"), "-")
_DASH = re.compile(r"(^|[^\s0-9)\]}%])(\s+)[\u2012\u2013](?=[.0-9])|(^|[^\s\w)\]}%])[\u2012\u2013](?=[.0-9])")
"""Where a dash is a minus: not behind a number, which makes it a range (7–8, 7 –8), nor directly behind a word."""
_HYPHENATED = re.compile(r"[\w)\]}%]")
"""What a hyphen follows: 1-10, \\boxed{7}-8, GPT-4."""

_MARKS = r"[\s*_`$(){}\[\]]*"
"""What stands around numbers: **8**, $\\boxed{8}$, [[8]], 8 (out of 10)."""
_UNIT = r"(?:points?|pts|stars?|marks?)"
_MEASURE = re.compile(
    rf"{_MARKS}(?:{_UNIT}\b{_MARKS})?(?:[/\u2044\u2215]|(?:out\s+)?of\b|max(?:imum)?\b(?:\s+of\b)?[.:]?)"
    rf"(?:\s*(?:an?\s+)?(?:total|maximum|max|possible|perfect)\b(?:\s+of\b)?)?{_MARKS}",
    re.IGNORECASE,
)
"""Between a number and what it is measured by: **8**/10, 8 points (out of a possible 10), 8 (max 10)."""
_UP_TO = re.compile(r"\s*(?:-|\u2013|\u2014|to)\s*", re.IGNORECASE)
"""Between the ends of a scale."""
_SCALE_OF = re.compile(r"\bscale\s+(?:of|from)[\s*_`(\[]*$", re.IGNORECASE)
"""Before a scale, or its one end."""
_SCALE_IS = re.compile(r"\bscale(?:\s+is)?\s*:?[\s*_`(\[]*$", re.IGNORECASE)
"""Before a scale with two ends."""
_NAMED_SCALE = re.compile(rf"[)\]\s*_`-]*(?:{_UNIT}[\s-]*)?scale\b", re.IGNORECASE)
"""Behind a scale, or its one end: 1-10 scale, 10-point scale."""
_SAME = re.compile(r"[\s*_,;(\[]*(?:=|≈|\bi\.?\s?e\.?|\bor\b|\bthat\s+is)?[\s*_,;(\[]*", re.IGNORECASE)
"""Between a measured number and the same once more: 8/10 (80%), 8 out of 10, i.e. 4 out of 5."""

_OF_A_SCALE = re.compile(r"(?<![a-z])(?:scale|out[\s_-]+of|max(?:imum)?)(?![a-z])[^.;\n]{0,40}$", re.IGNORECASE)
"""Before what may be a scale: 8 on a scale where 10 is best; {"score": 8, "out_of": 10}."""
_NO_MEASURED = re.compile(rf"(?:/|\bout\s+of\b){_MARKS}$", re.IGNORECASE)
"""Eight/10, eight out of 10."""
_EXTREME = re.compile(
    r"[\s*_`]*(?:is|being|means|=)\s*(?:the\s+)?(?:best|highest|max|top|perfect|worst|lowest)", re.IGNORECASE
)
_HALF = re.compile(r"(?:[0-9][eE][+-]?|[0-9],|(?:^|[^.])\.)$")
"""Before what is no whole number: the 3 of 1e-3, the 000 of 1,000, the 5 of .5."""
_SCORE = re.compile(r"\b(?:scores?|rating|rated?|reward|grade|verdict|total|final|overall)\b", re.IGNORECASE)
_NEAR = 120
"""So many characters beside a number are looked at."""


def number_in(pattern: Expression, answer: str) -> float:
    """Of the last match that is no scale, the number at its end. Raises NoAnswer where none is, or it is not clear."""
    text = with_minuses(answer)
    found = [unhyphened(one, text) for one in pattern.finditer(text)]
    scales = scales_among(found, text)
    last = next((number for number in reversed(range(len(found))) if number not in scales), -1)
    if last >= 0 and (fault := ambiguity(found, last, scales, text)):
        raise NoAnswer(f"{fault}: the answer {answer[-500:]!r}; tell the judge to end with the number alone")
    try:
        # An expression such as "score: [0-9]+" has the number at its end.
        value = float(re.split(r"[^0-9.eE+-]", found[last].text.strip())[-1]) if last >= 0 else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NoAnswer(f"no number in the answer {answer[:500]!r}")
    if fault := fault_of("its number", value):
        raise NoAnswer(f"{fault}; the answer {answer[:500]!r}")
    return value


def with_minuses(answer: str) -> str:
    """With - for the minus of typographers and the dash before a number; every position stays.

    >>> with_minuses("\N{MINUS SIGN}5, reward: \N{EN DASH}3, 7\N{EN DASH}8")
    '-5, reward: -3, 7–8'
    """
    return _DASH.sub(lambda dash: dash[0][:-1] + "-", answer.translate(_MINUSES))


def unhyphened(found: Found, text: str) -> Found:
    """Without a minus that stands directly behind a number or a word: a hyphen, as in 1-10."""
    if found.text.startswith("-") and _HYPHENATED.fullmatch(text[found.start - 1 : found.start]):
        return Found(found.start + 1, found.end, found.text[1:])
    return found


def scales_among(found: list[Found], text: str) -> set[int]:
    """Which of them say what another is measured by, or say it again in percent."""
    scales: set[int] = set()
    between = [text[max(one.end, other.start - _NEAR) : other.start] for one, other in pairwise(found)]
    for number, one in enumerate(found):
        if number in scales:
            continue
        before = between[number - 1] if number else text[max(0, one.start - _NEAR) : one.start]
        behind = text[one.end : one.end + _NEAR]
        if number < len(between) and _UP_TO.fullmatch(between[number]):
            end = found[number + 1].end
            is_named = _SCALE_IS.search(before) or _NAMED_SCALE.match(text[end : end + _NEAR])
            if is_named or _SCALE_OF.search(before):
                scales |= {number, number + 1}
                continue
        is_percent = number - 1 in scales and behind.lstrip().startswith("%") and _SAME.fullmatch(before)
        is_measure = number and _MEASURE.fullmatch(before)
        if is_measure or is_percent or _SCALE_OF.search(before) or _NAMED_SCALE.match(behind):
            scales.add(number)
    return scales


def ambiguity(found: list[Found], number: int, scales: set[int], text: str) -> str:
    """Why that one may be no verdict; empty where it is one, as far as can be seen."""
    one = found[number]
    digits = one.start + one.text.rstrip().rfind(re.split(r"[^0-9.eE+]", one.text.strip())[-1])
    if _HALF.search(text[max(0, digits - 3) : digits]):
        return "its last number may be a part of one"
    if _NO_MEASURED.search(text[max(0, one.start - _NEAR) : one.start]):
        return "its last number may be the scale of one in words"
    if not number:
        return ""
    between = text[max(found[number - 1].end, one.start - _NEAR) : one.start]
    behind = text[one.end : one.end + _NEAR]
    named = _NAMED_SCALE.match(between)
    if _OF_A_SCALE.search(between[named.end() if named else 0 :]) or _EXTREME.match(behind):
        return "its last number may be a scale"
    if number - 1 in scales and _SAME.fullmatch(between) and re.search(r"[^\s*_,;]", between):
        return "" if "\n" in between else "it says two numbers for the same"
    if _is_aside(text[max(found[0].end, one.start - _NEAR) : one.start], one.text, behind):
        return "its last number stands in brackets behind another"
    return ""


def _is_aside(before: str, number: str, behind: str) -> bool:
    """7 (3 steps are wrong), but not **7** (8) nor 3 facts (score: 7)."""
    closed = 0
    for place in reversed(range(len(before))):
        closed += (before[place] in ")]") - (before[place] in "([")
        if closed < 0:
            inside = before[place:]
            is_alone = not re.sub(r"[\s*_`$({\[]|\\boxed", "", inside) and re.match(r"[\s*_`$}]*[)\]]", behind)
            return not is_alone and not _SCORE.search(inside + number)
    return False

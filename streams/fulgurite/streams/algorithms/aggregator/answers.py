"""The number that a judge's answer gives, where it is the only one that can be meant.

Promises: scales that are known as such are left out first (8/10, 8 (out of 10), 8 on a scale of 1-10). Of what is left
a number counts in three cases only:
    it is said to be the verdict    Final score: 8 before Score: 8, [[8]], {"score": 8} and a first or last line of 8
    it is the only number           I'd give it an 8.
    the settings say where it is    by an expression with words of its own: its last match
What is said twice must be the same. Everything else is refused: a reward that is missing is seen, one that is the end
of a scale is not. So a scale that is not known as such costs a try: it is another number. Time is linear in the answer.
Does not know whose answer it is, nor numbers in the words of other languages than English.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fulgurite.streams.algorithms.aggregator.combine import fault_of
from fulgurite.streams.algorithms.chat import NoAnswer
from fulgurite.streams.algorithms.expressions import Expression, Found

Place = tuple[int, int]
"""Characters start (inclusive) to end (exclusive)."""

_MINUSES = dict.fromkeys(map(ord, "\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}"), "-")
_DASH = re.compile(r"(^|[^\s0-9)\]}%])(\s+)[\u2012\u2013](?=[.0-9])|(^|[^\s\w)\]}%])[\u2012\u2013](?=[.0-9])")
"""Where a dash is a minus: not behind a number, which makes it a range (7–8, 7 –8), nor directly behind a word."""

_DIGITS = r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"(?<![^\W_])(?<![.,)\]}}%-]){_DIGITS}(?![^\W_]|[.,][0-9])")
"""A whole one: nothing of 1,000, 5th, GPT-4, x)-5."""
_WORDS = {"zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
"""A number in words; one is seldom meant as one."""

# The scales: only what can be nothing else, as a verdict that is left out may leave another number alone.
_MARKS = r"[\s*_`$(){}\[\]]{0,12}"
"""What stands around numbers: **8**, $\\boxed{8}$, [[8]], 8 (out of 10)."""
_UNIT = r"(?:points?|pts|stars?|marks?)\b"
_END = r"(?:[+-]?[0-9]+(?:\.[0-9]+)?|one|five|ten|hundred)(?!\w|[.,][0-9])"
_LOW = rf"(?:(?:[01]|zero|one)(?:\.0)?(?!\w|[.,][0-9])|-{_END})"
_RANGE = rf"{_LOW}(?:\s?\([^()\d\n]{{0,40}}\))?\s{{0,3}}(?:[-\u2013\u2014]|(?:up\s)?to|through)\s{{0,3}}{_END}"
_OUT_OF = rf"\bout\sof(?:\san?)?(?:\s(?:total|maximum|max|possible|perfect))?(?:\sof)?{_MARKS}{_END}"
_MEASURE = rf"(?:(?:[/\u2044\u2215]|of\b|max(?:imum)?\b(?:\sof\b)?[.:]?){_MARKS}{_END}|{_OUT_OF})"
_SAME = rf"[\s*_]{{0,5}}[(=≈][\s*_]{{0,5}}{_DIGITS}\s?%"
_ON_A = r"(?:\b(?:on|using)\s(?:an?|the)\s)?"
_SCALE = re.compile(
    rf"(?<=[0-9])(?:{_MARKS}(?:{_UNIT}{_MARKS})?{_MEASURE})+(?:{_SAME})?"
    rf"|{_OUT_OF}|[(\[]\s?(?:{_MEASURE}|{_RANGE})\s?[)\]]"
    rf"|{_ON_A}\bscale\b:?(?:\s(?:of|from|is|ranging)\b){{0,2}}{_MARKS}{_RANGE}(?:\s?\([^()\d\n]{{0,40}}\))?"
    rf"|{_ON_A}\bscale\s(?:of|from)\s{_END}|{_ON_A}(?<![\w.,])(?:{_RANGE}(?:[ -]point)?|{_END}[ -]point)[ -]scale\b",
    re.IGNORECASE,
)

_NOUN = r"(?:score|rating|reward|grade|verdict|judge?ment)"
_FINAL = rf"(?:(?:final|overall)[\s_-]?){{1,2}}{_NOUN}?"
_PLAIN = rf"(?:(?:my|the|total)[\s_-])?{_NOUN}"
_LINE = r"^[ \t>#*_`{-]*(?:[0-9]{1,2}[.)][ \t])?[*_`]{0,3}"
_SENTENCE = r"(?<!max)(?<!min)[.!?][*_)\"']{0,3}[ \t]+[*_]{0,3}(?=(?-i:[A-Z]))"
"""Where a verdict may begin. Not behind a word: the maximum score: 10."""
_IS = r"[ \t*_`()\[\]]*[:=]"
_BEFORE = r"(?:\\boxed|[ \t*_`$({\[\"'+])*"
_BEHIND = rf"(?:\s?%)?(?:[ -]?{_UNIT})?[*_`$)}}\]\"' \t\r]*+"
_ENDS = r"(?:[.,;!]?[*_)]*\r?$|[.!]\s|[(\u2013\u2014-][^\d\n]*$)"
"""Behind a verdict, so that it is not one end of something: Score: 10 - 2 = 8, Score: 10 would be too much."""


def _said(label: str, leads: str, is_: str, more: str = "") -> re.Pattern[str]:
    """Numbers that are said to be the verdict by a label; in each match the last group is one."""
    same_line = rf"(?:{is_}){_BEFORE}({_DIGITS}){_BEHIND}{_ENDS}"
    next_line = rf"(?:{_IS})?[ \t*_`]*+\s*\n{_BEFORE}({_DIGITS}){_BEHIND}$"
    line = rf"(?:{_LINE}|{_SENTENCE}){leads}{label}(?:{same_line}|{next_line})"
    tag = rf"<{label}>\s*({_DIGITS})\s*</"
    key = rf"[\"']{label}[\"']\s*:\s*[\"']?({_DIGITS})\s*+[\"']?\s*+(?:[,}}]|$)"
    return re.compile(rf"{line}|{tag}|{key}{more}", re.IGNORECASE | re.MULTILINE)


_SAID_FINALLY = _said(_FINAL, r"(?:(?:so|therefore|thus|hence|my|the)\b,?\s){0,2}", rf"{_IS}|\sis\s")
_SAID = _said(_PLAIN, "", _IS, rf"|\[\[\s*({_DIGITS})\s*\]\]|\[RESULT\]{_BEFORE}({_DIGITS}){_BEHIND}{_ENDS}")
_ALONE = re.compile(rf"[\s*_`$]*((?:\\boxed|[({{\[])+)?\+?({_DIGITS})(?(1)[)}}\]]+)(?:\s?%)?(?:\s?{_UNIT})?[\s*_`$]*")
"""A line of a number. Not 3. and 3), where a list begins or was cut off."""
_NO_TEXT = re.compile(r"[\W_]*|```\w*")
_SENTENCE_ENDS = re.compile(r"[.!?][\s*_`)\"'\]]*$")
_LIMIT = re.compile(rf"(?:[/\u2044\u2215]|\b(?:out\s+of|max\w*|scale)\b[^.\n]{{0,40}}){_MARKS}$", re.IGNORECASE)
"""Before a number that is no verdict, alone as it may be: Eight/10, acht (max. 10)."""
_NEAR = 60
_TRAILING = " \t\r\n.,%"

_ADVICE = (
    "tell the judge to end with a line such as Final score: 8, or give `answer` an expression with the words before it"
)


def number_in(pattern: Expression, answer: str) -> float:
    """Raises NoAnswer where there is none, or it is not clear which."""
    text = with_minuses(answer)
    found = [place for one in pattern.finditer(text) if (place := _trimmed(one))]
    if not found:
        raise NoAnswer(f"no number in the answer {answer[:500]!r}")
    rest = without_scales(text)
    whole = [one.span() for one in _NUMBER.finditer(rest)]
    start, end = found[-1]
    if re.fullmatch(_DIGITS, text[start:end]):
        value = _verdict(rest, set(whole), found)
    else:
        inside = [place for place in whole if start <= place[0] and place[1] <= end]
        value = _value(rest, inside[-1]) if inside else None
    if value is None:
        raise NoAnswer(f"not clear which number is the verdict in the answer {answer[-500:]!r}; {_ADVICE}")
    if fault := fault_of("its number", value):
        raise NoAnswer(f"{fault}; the answer {answer[:500]!r}")
    return value


def with_minuses(answer: str) -> str:
    """With - for the minus of typographers and the dash before a number; every position stays.

    >>> with_minuses("\N{MINUS SIGN}5, reward: \N{EN DASH}3, 7\N{EN DASH}8")
    '-5, reward: -3, 7–8'
    """
    return _DASH.sub(lambda dash: dash[0][:-1] + "-", answer.translate(_MINUSES))


def without_scales(text: str) -> str:
    """With blanks for them; every position stays.

    >>> without_scales("Score (1-10): 8/10.")
    'Score       : 8   .'
    """
    return _SCALE.sub(lambda scale: " " * len(scale[0]), text)


def _verdict(rest: str, whole: set[Place], found: list[Place]) -> float | None:
    """The number of those found that is said to be it, or is the only one; None where it is not clear."""
    said = [one.span(one.lastindex or 0) for one in _SAID_FINALLY.finditer(rest)]
    said = said or [*(one.span(one.lastindex or 0) for one in _SAID.finditer(rest)), *_alone(rest)]
    if said:
        return _same(rest, said) if whole.issuperset(said) and set(found).issuperset(said) else None
    left = [place for place in found if rest[slice(*place)].strip()]
    return _same(rest, left) if whole.issuperset(left) and _is_only(rest, left) else None


def _alone(rest: str) -> Iterator[Place]:
    """The numbers that are the first line or the last one, but not one that the line before it may introduce (Max:)."""
    lines = [line for line in re.finditer(r".+", rest) if not _NO_TEXT.fullmatch(line[0])]
    first, last = (_ALONE.fullmatch(rest, *line.span()) for line in (lines[0], lines[-1])) if lines else (None, None)
    if first and (len(lines) == 1 or not first[1]):  # [1] and (1) may begin a list
        yield first.span(2)
    if last and (first or _SENTENCE_ENDS.search(lines[-2][0][-_NEAR:])):
        yield last.span(2)


def _is_only(rest: str, places: list[Place]) -> bool:
    """Whether no other number is said in words or foreign digits, and none of them ends a scale of one that is."""
    said = {_value(rest, place) for place in places}
    words = {float(_WORDS[one[0].lower()]) for one in _WORD.finditer(rest)}
    is_foreign = any(char.isnumeric() and not char.isascii() and char != "一" for char in rest)
    return words <= said and not is_foreign and not any(_LIMIT.search(rest[max(0, s - _NEAR) : s]) for s, _ in places)


def _same(rest: str, places: list[Place]) -> float | None:
    """Their value, if all have the same."""
    values = {_value(rest, place) for place in places}
    return values.pop() if len(values) == 1 else None


def _value(rest: str, place: Place) -> float:
    return float(rest[slice(*place)])


def _trimmed(one: Found) -> Place | None:
    text = one.text.lstrip(" \t\r\n+")
    place = one.end - len(text), one.end - len(text) + len(text.rstrip(_TRAILING))
    return place if place[0] < place[1] else None

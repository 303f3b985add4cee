"""Expressions mean what they mean to Python, at positions of characters, and none of them can stop a stream."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.patterns import glob, portable
from fulgurite.streams.algorithms.expressions import Expression, Found

PATTERNS = ("a+b?", "(?i)straße|Ab", r"\d{2,3}", r"^.", r"\bé", r"[^a]$", r"x\s+y|\n", "[ä-ö]+")


@given(
    pattern=st.sampled_from(PATTERNS),
    text=st.text(st.sampled_from("aAbBéä ß\n123xyö\U0001f600\ud800"), max_size=40),
)
def test_they_find_what_python_finds_where_python_finds_it(pattern: str, text: str) -> None:
    found = portable(pattern)
    expected = [Found(match.start(), match.end(), match[0]) for match in found.compiled().finditer(text)]
    assert list(Expression(found).finditer(text)) == expected
    assert Expression(found).found_in(text) == bool(expected)


def test_no_expression_is_slow() -> None:
    """Python's own engine would take longer than the universe has."""
    began = time.monotonic()
    assert not Expression(portable("(a+)+b")).found_in("a" * 50_000)
    assert not Expression(glob("*a" * 20 + "*b")).found_in("a" * 50_000)
    assert time.monotonic() - began < 10


def test_one_that_grows_too_large_says_so() -> None:
    with pytest.raises(SettingsError, match=r"cannot be used: invalid repetition size: \{1000\}"):
        Expression(portable("(?:(?:abcdefgh){1000}){1000}"))

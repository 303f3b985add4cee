"""Regular expressions for two engines: what is taken, what it means, what is refused with which words."""

from __future__ import annotations

import pytest

from fulgurite.schemas.patterns import glob, portable


@pytest.mark.parametrize(
    ("regex", "inside", "outside"),
    [
        (r"a.c", "abc", "a\nc"),
        (r"end$", "the end", "end\n"),
        (r"^a", "ab", "ba"),
        (r"(?i)secret", "My-SeCrEt", "ſecret"),
        (r"(?i)[a-f]0", "D0", "g0"),
        (r"(?i)[^k]x", "ax", "Kx"),
        (r"\d{3}", "x123", "x12"),
        (r"\d", "1", "١"),
        (r"a\sx", "a\tx", "a\vx"),
        (r"[\s,]x", ",x", "\vx"),
        (r"(a|b)+c", "abac", "c"),
        (r"a{2,3}?b", "aaab", "ab"),
        (r"(?:[0-9]+\.){3}[0-9]+", "10.0.0.1", "10.0.1"),
        (r"(?:\.[a-z]{1,9})*=", ".a.b=", ".a.b"),
        (r"(?:a+b)?c+", "aabcc", "aab"),
        (r"\x41", "A", "a"),
        (r"[\x00-\x1f]", "a\x01", "ab"),
        (r"[]-]", "x-", "x"),
        (r"\-\@\"\/", '-@"/', "-@"),
        (r"é+", "café", "cafe"),
        (r"a\{2\}", "a{2}", "aa"),
    ],
)
def test_what_is_taken_means_one_thing(regex: str, inside: str, outside: str) -> None:
    compiled = portable(regex).compiled()
    assert compiled.search(inside)
    assert not compiled.search(outside)


@pytest.mark.parametrize(
    ("regex", "words"),
    [
        (r"(?=a)b", r"of \(\?…\) only"),
        (r"(?<!a)b", r"of \(\?…\) only"),
        (r"(?P<n>a)(?P=n)", r"of \(\?…\) only"),
        (r"a(?i)b", r"of \(\?…\) only"),
        (r"(a)\1", r"\\1 does not mean the same"),
        (r"\p{L}", r"\\p does not mean the same"),
        (r"\Z", r"\\Z does not mean the same"),
        (r"[\b]", r"\\b within \[ \]"),
        (r"[[:alpha:]]", r"\[ within \[ \]"),
        (r"a++", "possessive"),
        (r"a**", "nothing for"),
        (r"*a", "nothing for"),
        (r"(*a)", "nothing for"),
        (r"a{,3}", "must begin {n}"),
        (r"a{1001}", "more than 1000"),
        (r"(a", "missing"),
        (r"a)", "unbalanced"),
        (r"[a", "ends in the middle"),
        ("a\\", "ends in the middle"),
        (r"[z-a]", "no range"),
        (r"a*", "matches the empty text"),
        (r"\b", "matches the empty text"),
        (r"a|", "matches the empty text"),
        (r"a{5}{5}", "nothing for"),
        ("x" * 5_000, "longer than"),
        (r"(a+)+b", r"\+ repeats what repeats without bound itself"),
        (r"(a*x|b){2,}c", r"\{2,\} repeats what repeats"),
        (r"(?:(b|(a{1,}))c)*d", r"\* repeats what repeats"),
        (r"(a+){11}b", r"\{11\} repeats what repeats"),
        (r"(a+){0,11}b", r"\{0,11\} repeats what repeats"),
    ],
)
def test_what_is_refused_is_told(regex: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        portable(regex, for_python=True)


def test_a_glob_matches_whole_names() -> None:
    compiled = glob("http.*.auth?").compiled()
    assert compiled.search("http.request.auth1")
    assert not compiled.search("http.request.auth")
    assert not compiled.search("xhttp.request.auth1")
    assert not compiled.search("httpxrequest.auth1")
    assert glob("a*").compiled().search("a\nb")


def test_what_is_slow_in_python_alone_is_taken_for_other_engines() -> None:
    assert portable("(a+)+b").re2 == "(?:a+)+b"

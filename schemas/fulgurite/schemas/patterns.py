"""Regular expressions that mean the same to Python and to RE2 (ClickHouse, Go, Rust).

What both engines have and read alike is taken; what only one has, or reads otherwise, is refused with what to write
instead, or rewritten: `.` is any character but a newline, `^` and `$` are the very beginning and end of the text,
`\\s \\d \\w \\b` know ASCII, a leading `(?i)` is about ASCII letters. No lookaround, no backreferences: RE2 has none,
which is why it is never slow. Python may be, so that for it what repeats without bound is not repeated many times
itself. Knows nothing of what the expressions are for.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

MAX_PATTERN_CHARS = 4_096
MAX_REPEAT = 1_000
"""RE2's own bound of {n}."""
MAX_NESTED_REPEAT = 10
"""Of what holds a repetition without bound: for every further one Python may try all places once more."""

_END = "\0end\0"
_SPACE = r"\t\n\f\r "
_ESCAPES = "dDwWbBtnrfvA"
_SAMPLES = ("", "a", "A b", "0-0", "a\nb ", ".,;:")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One expression in both dialects."""

    python: str
    """For re.compile(..., re.ASCII)."""
    re2: str

    def compiled(self) -> re.Pattern[str]:
        return re.compile(self.python, re.ASCII)


def portable(regex: str, *, for_python: bool = False) -> Pattern:
    """Raises ValueError: what cannot be taken, and what to write instead. `for_python`: its engine is going to run it
    on texts of others."""
    if len(regex) > MAX_PATTERN_CHARS:
        raise ValueError(f"longer than {MAX_PATTERN_CHARS} characters")
    if "\0" in regex:
        raise ValueError("a NUL character")
    rewritten = "".join(_Reader(regex, for_python).tokens())
    pattern = Pattern(rewritten.replace(_END, r"\Z"), rewritten.replace(_END, r"\z"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compiled = pattern.compiled()
        except (re.error, FutureWarning, DeprecationWarning, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None
    if any(match.end() == match.start() for sample in _SAMPLES for match in compiled.finditer(sample)):
        raise ValueError("it matches the empty text: it must match at least one character")
    return pattern


def glob(text: str) -> Pattern:
    """`*` any characters, `?` one; the whole text must match."""
    parts = {"*": r"(?:[^\n]|\n)*", "?": r"(?:[^\n]|\n)"}
    body = "".join(parts.get(character) or _literal(character) for character in text)
    return Pattern(rf"\A(?:{body})\Z", rf"\A(?:{body})\z")


def _literal(character: str) -> str:
    return "\\" + character if character.isascii() and not (character.isalnum() or character in "_ \n") else character


class _Reader:
    """Reads an expression token by token and gives it back in what both dialects share."""

    def __init__(self, regex: str, for_python: bool) -> None:
        self._for_python = for_python
        self._ignore_case = regex.startswith("(?i)")
        self._text = regex.removeprefix("(?i)")
        self._at = 0
        self._repeatable = False
        self._endless = [False]
        """Of the whole and every open group: whether something in it repeats without bound."""
        self._last_endless = False
        """The same of what a repetition would repeat."""

    def tokens(self) -> list[str]:
        found: list[str] = []
        while self._at < len(self._text):
            found.append(self._token())
        return found

    def _token(self) -> str:
        character = self._take()
        if character in "*+?{":
            return self._repeat(character)
        if character == "(":
            return self._group()
        self._repeatable = character != "|"
        self._last_endless = character == ")" and self._closed()
        if character == "\\":
            return self._escape()
        if character == "[":
            return self._set()
        return {"^": r"\A", "$": _END, ".": r"[^\n]", ")": ")", "|": "|"}.get(character) or self._cased(character)

    def _take(self) -> str:
        if self._at >= len(self._text):
            raise ValueError("it ends in the middle")
        self._at += 1
        return self._text[self._at - 1]

    def _next_is(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _repeat(self, character: str) -> str:
        if not self._repeatable:
            raise ValueError(f"nothing for {character} to repeat (write \\{character} for the character itself)")
        self._repeatable = False
        if character == "{":
            counts = re.compile(r"([0-9]{1,4})(?:,([0-9]{0,4}))?\}").match(self._text, self._at)
            if counts is None:
                raise ValueError(r"{ must begin {n}, {n,} or {n,m} (write \{ for the character itself)")
            if any(int(count) > MAX_REPEAT for count in counts.groups() if count):
                raise ValueError(f"{{{counts[0]} repeats more than {MAX_REPEAT} times")
            self._at = counts.end()
            most = counts[1] if counts[2] is None else counts[2]
            self._bound(f"{{{counts[0]}", int(most) if most else None)
            character += counts[0]
        elif character != "?":
            self._bound(character, None)
        if self._next_is("+"):
            raise ValueError("possessive repetition is not known to RE2")
        if self._next_is("?"):
            character += self._take()
        return character

    def _bound(self, repetition: str, most: int | None) -> None:
        """Raises where Python could need time that doubles with each character: (a+)+b on a text of a's."""
        if self._for_python and self._last_endless and (most is None or most > MAX_NESTED_REPEAT):
            raise ValueError(
                f"{repetition} repeats what repeats without bound itself, which may take Python for ever: give the one "
                f"within a bound, as in (?:x{{1,64}}y){repetition}"
            )
        self._endless[-1] = self._endless[-1] or most is None

    def _closed(self) -> bool:
        """Whether something in the group that ends here repeats without bound: then so in what it is part of."""
        if len(self._endless) == 1:
            return False  # compiling says what is wrong
        within = self._endless.pop()
        self._endless[-1] = self._endless[-1] or within
        return within

    def _group(self) -> str:
        self._repeatable = False
        self._endless.append(False)
        if not self._next_is("?"):
            return "(?:"  # nobody asks what a group held; Python allows only a hundred that remember
        if not self._next_is("?:"):
            raise ValueError("of (?…) only (?:…), and (?i) at the very beginning, are known to both Python and RE2")
        self._at += 2
        return "(?:"

    def _escape(self) -> str:
        character = self._take()
        if character in "sS":
            return f"[{'^' if character == 'S' else ''}{_SPACE}]"
        if character in _ESCAPES:
            return "\\" + character
        if character == "x":
            return self._hexadecimal()
        if character.isalnum():
            raise ValueError(f"\\{character} does not mean the same to Python and RE2")
        return _literal(character)

    def _hexadecimal(self) -> str:
        digits = self._take() + self._take()
        if not re.fullmatch("[0-9A-Fa-f]{2}", digits):
            raise ValueError(r"\x must have two hexadecimal digits")
        return "\\x" + digits

    def _set(self) -> str:
        parts = ["["]
        if self._next_is("^"):
            parts.append(self._take())
        first = True
        while first or not self._next_is("]"):
            first = False
            parts.append(self._member())
        self._take()
        return "".join(parts) + "]"

    def _member(self) -> str:
        """One character, one class or one range within [ ]."""
        low = self._set_character()
        if len(low) > 1:
            return _SPACE if low == r"\s" else low
        if not (self._next_is("-") and not self._next_is("-]")):
            return _set_literal(low) + (_set_literal(low.swapcase()) if self._folds(low) else "")
        self._take()
        high = self._set_character()
        if len(high) > 1 or high < low:
            raise ValueError(f"{low}-{high} is no range")
        return f"{_set_literal(low)}-{_set_literal(high)}" + (self._other_case(low, high) if self._ignore_case else "")

    def _set_character(self) -> str:
        character = self._take()
        if character == "[":
            raise ValueError(r"[ within [ ] (write \[ for the character itself)")
        if character != "\\":
            return character
        character = self._take()
        if character in "dDwWs":
            return "\\" + character
        if character in "tnrfv":
            return {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}[character]
        if character == "x":
            return chr(int(self._hexadecimal()[2:], 16))
        if character.isalnum():
            raise ValueError(f"\\{character} within [ ] does not mean the same to Python and RE2")
        return character

    def _folds(self, character: str) -> bool:
        return self._ignore_case and character.isascii() and character.isalpha()

    def _cased(self, character: str) -> str:
        return f"[{character}{character.swapcase()}]" if self._folds(character) else _literal(character)

    def _other_case(self, low: str, high: str) -> str:
        """The letters of a range in their other case, one by one."""
        letters = (chr(code) for code in range(ord(low), min(ord(high), 0x7F) + 1))
        return "".join(letter.swapcase() for letter in letters if letter.isalpha())


def _set_literal(character: str) -> str:
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return rf"\x{ord(character):02x}"
    return "\\" + character if character in "\\]^-[&~|" else character

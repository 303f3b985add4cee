"""The section `redaction`: what must not be stored, as rules. Applied twice by the same rules, with the same result:

    our producers ──► producers.redaction (Python) ──► Kafka ──► views with redaction_sql ──► ClickHouse
    foreign producers ─────────────────────────────────► Kafka ──┘

The first matching rule of `keys` decides over an attribute, and over the column that is made of it; every rule of
`values` is applied to every other text; then texts that are too long are cut, visibly. A rule that Python or ClickHouse
(RE2) would not understand, or would understand differently, is refused here. Ids, tokens, logprobs and versions are no
rule's business: `is_protected`.

Applying the rules twice changes nothing more, as long as no rule matches the marks that rules leave.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from fulgurite.schemas.patterns import Pattern, glob, portable
from fulgurite.schemas.sections import Section

MASK = "[redacted]"
"""What stands for a masked value; `[redacted:NAME]` for what a value rule took out."""

HASH_PREFIX = "sha256:"
HASH_DIGITS = 16
"""64 bits of the hash: enough to tell values apart, and short."""
HASHED = r"\Asha256:[0-9a-f]{16}\z"

MIN_CHARS = 64
"""Least of every bound on lengths: the mark of a cut must fit."""

PROTECTED_PREFIXES = ("fulgurite.", "agentlightning.")
PROTECTED_NAMES = ("prompt_token_ids", "response_token_ids")
"""Attributes that training or the log itself rests on."""

KNOWN_VALUES = {
    "email": r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}",
    # By issuer (Visa, Mastercard, Discover, American Express): any 16 digits would take timestamps and ids as well.
    "card_number": (
        r"\b(?:(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|6011|65[0-9]{2})[ -]?[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}"
        r"|3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5})\b"
    ),
    "api_key": (
        r"\b(?:(?:sk|pk|rk|hf|ghp|gho|ghu|ghs|ghr|glpat|xox[abprs])[_-][A-Za-z0-9_-]{16,}|AKIA[0-9A-Z]{16}\b"
        r"|AIza[0-9A-Za-z_-]{35})"
    ),
    "bearer": r"(?i)\bbearer +[A-Za-z0-9._~+/=-]{8,}",
    "jwt": r"\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*",
    "private_key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*-----END [A-Z ]*PRIVATE KEY-----",
}
"""Value rules that need only their name."""

KNOWN_PARTS = {"email": "@", "jwt": "eyJ", "private_key": "PRIVATE KEY-----"}
"""What a text must hold for the known rule to match at all: quicker to look for than the expression."""

KNOWN_SKIPS = {"jwt": r"\beyJ[A-Za-z0-9_-]*"}
"""What begins where the known rule does not match, and has no match that begins within. Python's engine would search a
word of nothing but beginnings ("eyJ-eyJ-…") to its end from each of them; RE2 does not."""


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyRule(_Rule):
    """Which attributes, by name, and what becomes of them."""

    name: str = ""
    regex: str = ""
    action: Literal["drop", "mask", "hash", "cut"]
    chars: Annotated[int, Field(ge=0)] = 0

    @field_validator("regex")
    @classmethod
    def _is_portable(cls, regex: str) -> str:
        return _checked(regex)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if bool(self.name) == bool(self.regex):
            raise ValueError("must have a name (with * and ?) or a regex, not both")
        if self.action == "cut" and self.chars < MIN_CHARS:
            raise ValueError(f"action cut needs chars, at least {MIN_CHARS}")
        if self.action != "cut" and self.chars:
            raise ValueError("chars has no effect but with action cut")
        return self

    @property
    def pattern(self) -> Pattern:
        """To be searched in an attribute's name."""
        return portable(self.regex) if self.regex else glob(self.name)


class ValueRule(_Rule):
    """Which parts of texts; `[redacted:NAME]` takes their place."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    regex: str = ""

    @field_validator("regex")
    @classmethod
    def _is_portable(cls, regex: str) -> str:
        return _checked(regex)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self.regex and self.name not in KNOWN_VALUES:
            raise ValueError(f"{self.name} needs a regex; known without one: {', '.join(KNOWN_VALUES)}")
        return self

    @property
    def pattern(self) -> Pattern:
        return portable(self.regex or KNOWN_VALUES[self.name])

    @property
    def part(self) -> str:
        """A text without it does not match; empty where nothing is known."""
        return "" if self.regex else KNOWN_PARTS.get(self.name, "")

    @property
    def skip(self) -> str:
        """For re.ASCII: what need not be searched again where the rule did not match; empty where nothing is known."""
        return "" if self.regex else KNOWN_SKIPS.get(self.name, "")

    @property
    def mark(self) -> str:
        return f"[redacted:{self.name}]"


class RedactionSettings(Section):
    keys: Annotated[list[KeyRule], Field(max_length=64)] = Field(default_factory=list[KeyRule])
    """Rules for attributes by name, the first match decides: {name = "http.*", action = "drop"} or {regex = …};
    action is drop, mask, hash or cut (with chars)."""
    values: Annotated[list[ValueRule], Field(max_length=64)] = Field(default_factory=list[ValueRule])
    """Rules for parts of texts: {name = "ticket", regex = "T-[0-9]+"}, or by name alone: email, card_number, api_key,
    bearer, jwt, private_key."""
    max_value_chars: int = 0
    """Longer attribute values are cut to this; 0: never."""
    max_text_chars: int = 0
    """Longer inputs, outputs and status messages are cut to this; 0: never."""
    hash_salt: SecretStr = SecretStr("")
    """Put before a value that is hashed, so that short ones cannot be guessed. Who may read the views sees it."""

    @field_validator("max_value_chars", "max_text_chars")
    @classmethod
    def _mark_fits(cls, chars: int) -> int:
        if chars != 0 and chars < MIN_CHARS:
            raise ValueError(f"must be 0 (no bound) or at least {MIN_CHARS}")
        return chars

    @field_validator("hash_salt")
    @classmethod
    def _salt_is_plain(cls, salt: SecretStr) -> SecretStr:
        if not salt.get_secret_value().isprintable() or not salt.get_secret_value().isascii():
            raise ValueError("must be printable ASCII")
        return salt

    @property
    def empty(self) -> bool:
        """Whether everything is stored as it comes."""
        return not (self.keys or self.values or self.max_value_chars or self.max_text_chars)


def is_protected(name: str) -> bool:
    """Whether no rule applies to the attribute."""
    return name.startswith(PROTECTED_PREFIXES) or name in PROTECTED_NAMES


def _checked(regex: str) -> str:
    if regex:
        try:
            portable(regex, for_python=True)
        except ValueError as error:
            raise ValueError(f"{regex!r} cannot be used: {error}") from None
    return regex

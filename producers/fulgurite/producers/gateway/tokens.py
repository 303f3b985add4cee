"""The tokens of a choice, checked: ids, one logprob each, and which version sampled them. Pure.

Where the backend must give them, what is missing or does not add up is an InvalidEvent; where it need not, or where the
answer broke off, what is whole is taken and the rest left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from pydantic import ValidationError

from fulgurite.producers.gateway.labels import is_version
from fulgurite.producers.gateway.outcome import Choice, Outcome, Served
from fulgurite.producers.gateway.protocols.base import whole_number
from fulgurite.schemas.errors import InvalidEvent
from fulgurite.schemas.event import VersionSpan

MAX_COUNTED: Final = 2**40
_COUNTS: Final = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
"""How chat completions and completions call them, and how the other protocols do."""
LOGPROB_TOLERANCE: Final = 1e-6
"""How far above 0 rounding may take the logprob of a token that was certain."""


@dataclass(slots=True, frozen=True)
class Tokens:
    """What of a choice one can train on, checked."""

    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list[VersionSpan])
    labels: list[str] = field(default_factory=list)
    """That could not be made versions of these: of an answer without ids, those around it."""

    @classmethod
    def of(cls, choice: Choice, served: Served, *, required: bool) -> Tokens:
        """Raises InvalidEvent where what must be there is not, or does not add up; where it need not be, takes what is
        whole."""
        prompt_ids, ids, logprobs = choice.prompt_ids, choice.token_ids, choice.logprobs
        if prompt_ids is None or ids is None:
            if required:
                raise InvalidEvent("no_token_ids", "the backend gave no token ids (does it know return_token_ids?)")
            return cls(labels=_labels_around(served))
        if not (are_ids(prompt_ids) and are_ids(ids)):
            if required:
                raise InvalidEvent("bad_field", "a token id is no whole number from 0")
            return cls(labels=_labels_around(served))
        if logprobs is None and ids and required:
            raise InvalidEvent("no_logprobs", "the backend gave no logprobs, or not one of each token")
        if logprobs is not None and len(logprobs) != len(ids):
            if required:
                raise InvalidEvent("wrong_length", f"{len(logprobs)} logprobs for {len(ids)} tokens")
            # A stream that broke off between the two: the ids are right, what the rest says of them is not known.
            return cls(prompt_ids, ids)
        if logprobs and not _are_logprobs(logprobs):
            if required:
                raise InvalidEvent("bad_field", "a logprob is no finite number up to 0")
            return cls(prompt_ids, ids)
        versions, labels = _versions(choice, served, len(ids), required=required)
        return cls(prompt_ids, ids, logprobs or [], versions, labels)


def are_ids(given: Sequence[Any]) -> bool:
    """Whether these can be token ids."""
    return set(map(type, given)) <= {int} and min(given, default=0) >= 0


def _are_logprobs(given: Sequence[Any]) -> bool:
    return set(map(type, given)) <= {float, int} and all(map(math.isfinite, given)) and max(given) <= LOGPROB_TOLERANCE


def check_count(outcome: Outcome) -> None:
    """Raises InvalidEvent where the backend counted other tokens than it gave: some were kept from us."""
    given = [choice.token_ids for choice in outcome.choices.values()]
    if outcome.output_tokens is None or any(ids is None for ids in given):
        return
    found = sum(len(ids) for ids in given if ids is not None)
    if found != outcome.output_tokens:
        raise InvalidEvent("wrong_length", f"{found} token ids, but the backend counts {outcome.output_tokens} tokens")


def counted(answer: bytes) -> tuple[int, int]:
    """(prompt tokens, sampled tokens) by an answer's own count, whatever else it is; 0 for what cannot be read."""
    try:
        usage = orjson.loads(answer)["usage"]
        given = [usage.get(old, usage.get(new)) for old, new in _COUNTS]
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError):
        return 0, 0
    prompt, sampled = (min(whole_number(number) or 0, MAX_COUNTED) for number in given)
    return prompt, sampled


def _labels_around(served: Served) -> list[str]:
    """What is known of the version from outside of the answer."""
    if served.adapter_version is not None:
        return [str(served.adapter_version)]
    return [label for label in (served.version_before, served.version_after) if label is not None]


def _versions(choice: Choice, served: Served, tokens: int, *, required: bool) -> tuple[list[VersionSpan], list[str]]:
    """(versions of the tokens, labels that are no versions).

    Without versions of its own the answer is bounded from outside: versions only grow, so the same label before and
    after means that it sampled every token.
    """
    if served.adapter_version is not None:
        return ([VersionSpan(version=served.adapter_version, start=0, end=tokens)] if tokens else []), []
    given = choice.versions
    if given is None:
        labels = _labels_around(served)
        if len(labels) == 2 and labels[0] == labels[1] and is_version(labels[0]):
            return ([VersionSpan(version=int(labels[0]), start=0, end=tokens)] if tokens else []), []
        return [], labels
    try:
        parts = [(str(part["version"]), part["start"], part["end"]) for part in given]
        if not required and (not parts or parts[-1][2] != tokens):
            return [], []
        labels = [label for label, _, _ in parts]
        if not all(map(is_version, labels)):
            return [], labels  # "default": a server whose weights nobody has numbered
        return [
            VersionSpan(version=int(label), start=start, end=end) for label, start, end in parts if start != end
        ], []
    except (TypeError, KeyError, ValidationError):
        raise InvalidEvent("bad_field", "weight_versions is not a list of {version, start, end}") from None

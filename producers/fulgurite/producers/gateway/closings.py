"""How a template closes answers of a form, read from what it writes of some. Pure functions.

    asked        <user> ? <end> <assistant> <think>         ends with the generation prompt
    one          <user> ? <end> <assistant>         a <end> <user> ?
    other        <user> ? <end> <assistant>         b <end> <user> ?
    followed     <user> ? <end> <assistant>         a <end> <user> !
                                            │ body │ tail       │
    alone        <user> ? <end> <assistant>         a <end> <assistant> <think>

A tail's first end-of-turn token closes the answer. Where `alone` has it as well, it is the answer's own; else it opens
what comes next, as the token of a role does in templates without ends, and must never be lost. What the generation
prompt has and `one` has not (`<think>`) is not in the history: there the turn before may be written otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fulgurite.producers.gateway.continuation import Closing
from fulgurite.producers.gateway.token_route import after_answer


@dataclass(slots=True, frozen=True)
class Opening:
    """A prompt, and where in it the generation prompt begins."""

    prompt: list[int]
    begins: int

    @property
    def generation(self) -> list[int]:
        return self.prompt[self.begins :]


@dataclass(slots=True, frozen=True)
class Written:
    """What the template makes of answers of a form, and of the role's message that follows them."""

    opening: Opening
    body: tuple[int, ...]
    tail: tuple[int, ...]
    own: frozenset[int] | None
    """What stands in an answer that nothing follows; None: not known."""
    dropped: tuple[int, ...]
    """The end of the generation prompt that is not written with an answer."""


def opening(asked: list[int], not_asked: list[int]) -> Opening:
    """The same messages, with a generation prompt and without."""
    return Opening(asked, alike(asked, not_asked))


def read(
    start: Opening, one: list[int], other: list[int], followed: list[int], alone: list[int] | None
) -> Written | None:
    """None where nothing of what follows is written. `one` and `other` are the same where the template does not write
    such answers at all (tool calls, in those that know of none): then all of it is tail."""
    ends_at = alike(one, followed)
    if one == followed:
        return None
    kept = alike(start.prompt, one)
    tail_at = max(len(one) - len(after_answer(one, other)), kept)
    if tail_at > ends_at:
        return None
    generation, own = start.generation, None
    if alone is not None and alone[len(alone) - len(generation) :] == generation:
        own = frozenset(alone[alike(start.prompt, alone) : len(alone) - len(generation)])
    dropped = tuple(start.prompt[kept:]) if kept >= start.begins else ()
    return Written(start, tuple(one[kept:tail_at]), tuple(one[tail_at:ends_at]), own, dropped)


def closing(written: Written, ends: Collection[int], sampled: int | None) -> Closing | None:
    """With which of the known ends of turns, if that is beyond doubt: once, and none comes before it. `sampled`: the
    end that the policy gave the answer."""
    token = next((token for token in written.tail if token in ends), None)
    if token is None or any(each in ends for each in written.body) or written.tail.count(token) > 1:
        return None
    if sampled is not None and sampled != token and sampled in written.tail:
        return None  # the answer's end comes later
    return Closing(token, None if written.own is None else token in written.own, written.dropped)


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """In how many tokens they begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))

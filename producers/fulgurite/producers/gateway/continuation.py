"""With which tokens the next prompt of a conversation begins: exactly those of its last call. Pure functions.

Without it a policy's answer is turned into text, comes back from the agent in a list of messages, and is tokenised
again by the chat template: other tokens than were sampled, as soon as the sampler did not choose the tokenizer's own
way to write the text, or a tool call's JSON comes back spaced differently. Then the next prompt does not begin with the
last prompt and its response, the calls cannot be merged into one sequence, and what is trained on is not what was seen.

    turn    rendered   <user> 2 + 2 <end> <assistant>
            response                                  4 2 <end>          as sampled
    now     rendered   <user> 2 + 2 <end> <assistant> 42  <end> <tool> ok <end> <assistant>
                       └ the same, checked ────────┘       └ tail, from here ───────────┘
    spliced prompt     <user> 2 + 2 <end> <assistant> 4 2 <end> <tool> ok <end> <assistant>

The caller has made sure that the messages continue the turn's and carry its answer unchanged (conversations.py). So the
tail begins where the template closed the answer: after the first token behind the turn's own messages with which it is
known to close answers of this form, once and at their very end (turn_ends.py finds that out). What only a generation
prompt has, such as the `<think>` that a thinking model is made to begin with, may be left out of the history: the
policy saw it, so it stays. So it is with earlier answers of the turn's that went on exactly: a template may write them
otherwise now, as those do that drop reasoning once another question is asked; what stands around them may not change.
Nothing is tokenised or decoded here, and no chat template is known: where one writes the history otherwise than before
(other tools), or where its closing of the answer is in doubt, the prompt stays as rendered and the reason is said.

Limit: token ids of text only. A prompt with images has their positions beside the ids; it must not be spliced.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Final, Literal

Reason = Literal["history", "end_of_turn", "form"]
"""`history`: the template writes the earlier messages otherwise than it did. `end_of_turn`: the token that closes the
answer is not to be found, or another end comes before it. `form`: how the template closes such answers is not known, or
it does so more than once."""

Form = tuple[bool, int, bool]
"""Of an answer: whether it has text, how many tool calls, whether reasoning. What a template may close differently."""

Place = tuple[int, int]
"""Of an answer in a rendered prompt: where it begins at the earliest, and where the token is that closes it."""

_BOUNDARY_TOKENS: Final = 1
"""Tokens at the end of a prompt that the answer's first characters may have merged with, where it is written again."""


@dataclass(slots=True, frozen=True)
class Closing:
    """How a template closes answers of a form."""

    token: int
    own: bool | None
    """Whether the token is the answer's own, which the policy's own end takes the place of. False: it opens what comes
    next, and is written where the policy ended with another. None: not known."""
    dropped: tuple[int, ...] = ()
    """With what its generation prompts end that is not written with an answer."""


class NotContinued(Exception):
    """The prompt cannot begin with the earlier tokens."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(slots=True, frozen=True)
class Turn:
    """One answered choice of a call."""

    rendered: array[int]
    """What the chat template made of its messages."""
    prompt: array[int]
    """What the policy was really asked with: `rendered`, or spliced in turn."""
    response: array[int]
    """As sampled."""
    finished: bool
    """Whether the response closes with an end-of-turn token; else it hit a length or a stop string."""
    ends: frozenset[int]
    """The end-of-turn tokens known for the policy, none of which the answer spells out."""
    answers: tuple[Place, ...] = ()
    """Those in `rendered` that it went on from exactly, the first one first."""

    @property
    def end(self) -> int | None:
        """With which token the policy ended it."""
        return self.response[-1] if self.finished else None


@dataclass(slots=True, frozen=True)
class Spliced:
    prompt: array[int]
    answers: tuple[Place, ...]
    """In what was rendered, for the turn that this becomes."""


def tokens(ids: list[int]) -> array[int]:
    return array("i", ids)


def splice(turn: Turn, rendered: array[int], closing: Closing | None) -> Spliced:
    """The prompt for `rendered`, beginning with exactly the turn's prompt and response. `closing`: how the template
    closes answers of the turn's form; None: not known. Raises NotContinued."""
    last = next((at for at in reversed(range(len(turn.rendered))) if turn.rendered[at] in turn.ends), -1)
    # The turn's messages must have been written alike, up to where its answer begins.
    same = max(len(turn.rendered) - _may_differ(turn, closing), last + 1)
    begins, answers = _follow(turn, rendered, same)
    if closing is None:
        raise NotContinued("form")
    closed = _first_end(turn, rendered, begins)
    if closed is None or rendered[closed] != closing.token:
        raise NotContinued("end_of_turn")
    if turn.end not in (None, closing.token) and closing.own is None:
        raise NotContinued("end_of_turn")
    is_ended = turn.end == closing.token or (turn.finished and closing.own)
    prompt = turn.prompt + turn.response + rendered[closed + 1 if is_ended else closed :]
    return Spliced(prompt, (*answers, (begins, closed)))


def _follow(turn: Turn, rendered: array[int], same: int) -> tuple[int, list[Place]]:
    """Where in `rendered` the turn's messages come to `same`, and its earlier answers. Raises NotContinued."""
    before = now = 0
    answers: list[Place] = []
    for begins, closed in (*turn.answers, (same, len(turn.rendered))):
        if rendered[now : now + begins - before] != turn.rendered[before:begins]:
            raise NotContinued("history")
        now += begins - before
        if begins == same:
            break
        found = _first_end(turn, rendered, now)
        if found is None or rendered[found] != turn.rendered[closed]:
            raise NotContinued("history")
        answers.append((now, found))
        before, now = closed, found
    return now, answers


def _first_end(turn: Turn, rendered: array[int], begins: int) -> int | None:
    return next((at for at in range(begins, len(rendered)) if rendered[at] in turn.ends), None)


def _may_differ(turn: Turn, closing: Closing | None) -> int:
    """How many tokens at the end of the turn's messages."""
    dropped = array("i", closing.dropped if closing else ())
    has_them = turn.rendered[max(len(turn.rendered) - len(dropped), 0) :] == dropped
    return _BOUNDARY_TOKENS + (len(dropped) if has_them else 0)

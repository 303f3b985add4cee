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
tail begins where the template closed the answer: after the end-of-turn token that follows those of the turn's own
messages. Nothing is tokenised or decoded here, and no chat template is known: where one writes the history otherwise
than before (other tools, reasoning left out) or closes the answer with no token that the policy is known to end with,
the prompt stays as rendered and the reason is said.

Limit: token ids of text only. A prompt with images has their positions beside the ids; it must not be spliced.
"""

from __future__ import annotations

from array import array
from collections.abc import Set
from dataclasses import dataclass
from typing import Final, Literal

Reason = Literal["history", "end_of_turn"]
"""`history`: the template writes the earlier messages otherwise than it did. `end_of_turn`: it is not known or not to
be found where the answer ends."""

_BOUNDARY_TOKENS: Final = 1
"""Tokens at the end of a prompt that the answer's first characters may have merged with, where it is written again."""


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
    """The end-of-turn tokens known for the policy."""


def tokens(ids: list[int]) -> array[int]:
    return array("i", ids)


def splice(turn: Turn, rendered: array[int]) -> array[int]:
    """The prompt for `rendered`, beginning with exactly the turn's prompt and response. Raises NotContinued."""
    before = _positions(turn.rendered, turn.ends)
    now = _positions(rendered, turn.ends)
    # The turn's messages must have been written alike, up to where its answer begins.
    same = max(len(turn.rendered) - _BOUNDARY_TOKENS, before[-1] + 1 if before else 0)
    if rendered[:same] != turn.rendered[:same]:
        raise NotContinued("history")
    if len(now) <= len(before):
        raise NotContinued("end_of_turn")
    closed = now[len(before)]
    tail = rendered[closed + 1 :] if turn.finished else rendered[closed:]
    return turn.prompt + turn.response + tail


def _positions(ids: array[int], wanted: Set[int]) -> list[int]:
    """Where the tokens stand, in order."""
    found: list[int] = []
    for token in wanted:
        at = -1
        for _ in range(ids.count(token)):
            at = ids.index(token, at + 1)
            found.append(at)
    return sorted(found)

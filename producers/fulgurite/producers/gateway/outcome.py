"""What the model said to one call, whichever protocol it said it in: the form between a protocol and the recording.

Holds what the backend gave as it gave it; whether it adds up is the recording's question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fulgurite.producers.gateway.errors import Headers
from fulgurite.producers.gateway.exchange import BackendKind


@dataclass(slots=True)
class Choice:
    """One of the answers of a call."""

    output: Any = None
    """A text, or what is recorded as JSON: the message of the model."""
    prompt_ids: list[int] | None = None
    """None, as for `token_ids`: the backend gave none."""
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    """None: there are none, or they are not in the shape of logprobs."""
    versions: list[dict[str, Any]] | None = None
    """[{version, start, end}] over token_ids, as given."""
    finish_reason: str = ""
    """Empty: it did not come to its end."""
    failed: str = ""
    """Why it is no finished answer, though it came whole."""


@dataclass(slots=True)
class Outcome:
    """An answer, or as much of one as arrived."""

    response_id: str = ""
    model: str = ""
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    input_tokens: int | None = None
    """As the backend counts; None where it does not say."""
    output_tokens: int | None = None
    """Of all choices."""

    def choice(self, index: int) -> Choice:
        """The choice of this number, begun if it is new."""
        found = self.choices.get(index)
        if found is None:
            found = self.choices[index] = Choice()
        return found


@dataclass(slots=True)
class Served:
    """Who answered, and how long it took."""

    kind: BackendKind
    endpoint: str
    resource: str
    tries: int
    status: int
    seconds: float = 0.0
    """From the first try to the end of the answer."""
    first_chunk_seconds: float | None = None
    """Of a stream: until its first event with text, tokens or a tool's call. None: there was none."""
    adapter_version: int | None = None
    """Of the adapter that answered: what a label says, and the answer's own versions, is of the weights below it."""
    grammar: bool | None = None
    """Whether it held the answer to a grammar. None: it does not say."""
    sampling: dict[str, float] = field(default_factory=dict[str, float])
    """What it says that it sampled with, where that makes of the policy another distribution: its own defaults, too."""
    headers: Headers = field(default_factory=list[tuple[bytes, bytes]])
    """What the agent is told of the answer's head; not recorded."""
    version_before: str | None = None
    version_after: str | None = None
    """Labels around the call, where the server does not put versions into its answers."""

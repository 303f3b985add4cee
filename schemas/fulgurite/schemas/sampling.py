"""Parameters of an LLM call under which the logprobs recorded are those of the policy, and those under which not.

Importance ratios need the distribution that was sampled from. The gateway records what a request says, the assembler
leaves out training calls that say otherwise, and the trainer asks for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

NEUTRAL_SAMPLING: Final[Mapping[str, frozenset[float]]] = {
    "temperature": frozenset({1}),
    "top_p": frozenset({1}),
    "top_k": frozenset({-1, 0}),
    "min_p": frozenset({0}),
    "presence_penalty": frozenset({0}),
    "frequency_penalty": frozenset({0}),
    "repetition_penalty": frozenset({1}),
}
"""Values under which the distribution that was sampled from is the policy's, whose logprobs are recorded: with any
other, importance ratios would compare the new policy with one that nobody sampled from. Not given counts as neutral, as
it is by OpenAI's API; a server with other defaults (vLLM takes a model's generation_config.json) must have them off.
"""

CONSTRAINTS: Final = frozenset(
    {
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "tool_choice",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "min_tokens",
        "text",
    }
)
"""Fields of a request that forbid or shift tokens: logprobs are not those of the distribution that was sampled from."""


def is_neutral(name: str, value: object) -> bool:
    """Whether this value of a field in NEUTRAL_SAMPLING leaves the policy as it is; it may be a number as text."""
    return value is None or _number(value) in NEUTRAL_SAMPLING[name]


def constrains(name: str, value: Any) -> bool:
    """Whether this value of a field of a request forbids or shifts tokens."""
    if name not in CONSTRAINTS or value is None:
        return False
    if name == "tool_choice":  # a tool that must be called is called by a grammar
        return value not in ("auto", "none") and value not in ({"type": "auto"}, {"type": "none"})
    if name == "text":  # of the Responses API
        value = value.get("format") if isinstance(value, dict) else None
    return bool(value) and value != {"type": "text"}


def off_policy(parameters: Mapping[str, Any]) -> Iterator[str]:
    """A fault for each parameter under which logprobs would not be the policy's; also of those that OpenAI's
    client passes on as `extra_body`."""
    extra: Any = parameters.get("extra_body")
    for name, value in {**parameters, **(extra if isinstance(extra, Mapping) else {})}.items():
        if name in NEUTRAL_SAMPLING and not is_neutral(name, value):
            wanted = " or ".join(f"{each:g}" for each in sorted(NEUTRAL_SAMPLING[name]))
            yield f"{name} = {value!r}; it must be {wanted}"
        elif constrains(name, value):
            yield f"{name} = {value!r} forbids or shifts tokens; leave it out"


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None

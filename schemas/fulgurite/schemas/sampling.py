"""Parameters of an LLM call under which the logprobs recorded are those of the policy, and those under which not.

Importance ratios need the distribution that was sampled from. The gateway records what a request says, the assembler
leaves out training calls that say otherwise, and the trainer asks for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
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

_HARMLESS: Final = """
model messages prompt input instructions system suffix documents previous_response_id previous_input_messages
conversation continue_final_message add_generation_prompt add_special_tokens chat_template chat_template_kwargs
media_io_kwargs mm_processor_kwargs mm_payload return_mm_kwargs truncate_prompt_tokens truncation_side truncation
modalities audio functions max_tool_calls web_search_options mcp_servers container
max_tokens max_completion_tokens max_output_tokens stop stop_sequences stop_token_ids ignore_eos n
length_penalty repetition_detection include_stop_str_in_output skip_special_tokens spaces_between_special_tokens
reasoning reasoning_effort thinking include_reasoning verbosity prediction
stream stream_options stream_interval echo include logprobs top_logprobs logprob_token_ids prompt_logprobs
return_token_ids return_tokens_as_token_ids return_weight_versions return_token_offsets return_prompt_text
routed_experts_prompt_start enable_response_messages
user metadata store background service_tier safety_identifier prompt_cache_key prompt_cache_retention cache_salt
priority request_id session_id seed kv_transfer_params ec_transfer_params betas
"""
HARMLESS: Final = frozenset(_HARMLESS.split())
"""Fields of requests, of all protocols, that leave the distribution as it is: they shape the prompt (its ids are
recorded), end an answer, say what is told of it, or who asks. length_penalty is of beam search alone."""

_SETS_NOTHING: Final[Mapping[str, tuple[Any, ...]]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none", {"type": "auto"}, {"type": "none"}),
    "function_call": ("auto", "none"),
    "min_tokens": (0,),
    "best_of": (1,),
    "thinking_token_budget": (-1,),
}
"""Values of other fields that ask for nothing. A tool that must be called is called by a grammar."""
_CLIENT: Final = frozenset({"extra_body", "extra_headers", "extra_query", "timeout"})
"""What OpenAI's client takes beside the fields of a request."""
MAX_NAMES: Final = 32
MAX_NAME_CHARS: Final = 64


def is_neutral(name: str, value: object) -> bool:
    """Whether this value of a field in NEUTRAL_SAMPLING leaves the policy as it is; it may be a number as text."""
    return value is None or _number(value) in NEUTRAL_SAMPLING[name]


def may_call_tools(request: Mapping[str, Any]) -> bool:
    return bool(request.get("tools")) and request.get("tool_choice") not in ("none", {"type": "none"})


def constraints(request: Mapping[str, Any]) -> list[str]:
    """The fields of a request that forbid or shift tokens, or may: logprobs are not those of the distribution that was
    sampled from. A field nobody knows here may be a way of sampling that a server learned since."""
    found = (name[:MAX_NAME_CHARS] for name, value in request.items() if _constrains(request, name, value))
    return list(islice(found, MAX_NAMES))


def _constrains(request: Mapping[str, Any], name: str, value: Any) -> bool:
    if name == "parallel_tool_calls":  # vLLM holds to one call by a grammar, of all of the answer
        return value is False and may_call_tools(request)
    if name in HARMLESS or name in NEUTRAL_SAMPLING or value is None or value is False or value in ("", [], {}):
        return False
    if name == "tools":  # vLLM holds a call of a strict tool to its schema, also one that the model chose to make
        return may_call_tools(request) and any(map(_is_strict, _list(value)))
    if name in ("text", "output_config") and isinstance(value, dict):  # of the Responses API, of Anthropic's messages
        value = value.get("format")
        return bool(value) and value != {"type": "text"}
    return value not in _SETS_NOTHING.get(name, ())


def _is_strict(tool: Any) -> bool:
    if not isinstance(tool, dict):
        return False
    function = tool.get("function")
    return bool(tool.get("strict")) or (isinstance(function, dict) and bool(function.get("strict")))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def off_policy(parameters: Mapping[str, Any]) -> Iterator[str]:
    """A fault for each parameter under which logprobs would not be the policy's; also of those that OpenAI's
    client passes on as `extra_body`."""
    extra: Any = parameters.get("extra_body")
    given = {**parameters, **(extra if isinstance(extra, Mapping) else {})}
    constraining = constraints({name: value for name, value in given.items() if name not in _CLIENT})
    for name, value in given.items():
        if name in NEUTRAL_SAMPLING and not is_neutral(name, value):
            wanted = " or ".join(f"{each:g}" for each in sorted(NEUTRAL_SAMPLING[name]))
            yield f"{name} = {value!r}; it must be {wanted}"
        elif name in constraining:
            yield f"{name} = {value!r} forbids or shifts tokens, or may; leave it out"


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None
